"""Where MLflow shows the result that lies here: its run with its description, and the version of its model.

    python -m pipeline.shown

Prints one line of JSON: experiment and run by their ids, description, model, version. The flow asks for it as a
program, for nothing under flows/ knows MLflow.
"""

from __future__ import annotations

import argparse
import json

from pipeline import publish, registry, stage, tracking

DESCRIPTION = "mlflow.note.content"  # the tag in which MLflow keeps it


def shown() -> dict[str, str]:
    """Experiment, run, description, model and version.

    Raises:
        Refusal: MLflow cannot be used, or knows no run of this result.
    """
    _, result = publish.published()
    with tracking.problems():
        store = tracking.Store(result["experiment"])
        run = store.published(result["publication"])
        if run is None:
            raise stage.Refusal(
                f"MLflow has no run of publication {result['publication'][:8]} yet: "
                "`python -m pipeline.publish` with MLflow in reach sends it"
            )
        found = {"experiment": store.experiment_id, "run": run.info.run_id}
        found["description"] = run.data.tags.get(DESCRIPTION, "")
        version = registry.registered(store, result["registered_model"], run.data.tags[registry.MODEL_SHA256])
        return found | ({"model": version.name, "version": str(version.version)} if version else {})


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.shown", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with stage.refusals("shown"):
        print(json.dumps(shown(), sort_keys=True))


if __name__ == "__main__":
    main()
