"""What came out, in about ten lines, after making sure that MLflow holds it: what `make repro` ends with.

python -m pipeline.summary
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline import files, page, publish, stage

SIDES = ("validation", "test")


def lines(
    evaluation: Mapping[str, Any],
    diagnosis: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    model: str,
    width: int,
) -> Iterable[str]:
    """The summary, a line each."""
    for side in SIDES:
        baselines = evaluation.get("baselines", {}).get(side, {})
        beside = ", ".join(f"{name} {_number(loss)}" for name, loss in baselines.items())
        yield (
            f"{side:10}  loss {_number(evaluation[side]['loss'])} nats a token, "
            f"perplexity {_number(evaluation[side]['perplexity'])}"
            + (f"  (losses beside it: {beside})" if beside else "")
        )
    yield f"{'verdict':10}  {diagnosis['verdict']}. {next(iter(diagnosis['advice']), '')}".rstrip()
    yield from (f"{'sample':10}  {page.one_line(sample['text'], width - 12)}" for sample in page.one_a_prompt(samples))
    yield f"{'model':10}  {model} (AutoModelForCausalLM.from_pretrained loads it)"
    yield f"{'look on':10}  make ui | dvc metrics diff | dvc plots show | {diagnosis['guide']}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def main() -> None:
    """Print the summary; a result that MLflow cannot take is still shown."""
    with stage.refusals("summary"):
        paths = stage.paths_of(stage.read_stages()["publish"])
        missing = [path for path in paths.values() if not path.exists()]
        if missing:
            raise stage.Refusal(f"there is no {missing[0]} yet; run `dvc repro`")
        shown = lines(
            files.read_json(paths["evaluation.json"], *SIDES),
            files.read_json(paths["diagnostics.json"], "verdict", "advice", "guide"),
            files.read_jsonl(paths["samples.jsonl"]),
            f"{paths['best'].as_posix()}/",
            shutil.get_terminal_size((110, 24)).columns,
        )
        print("\n".join(shown), flush=True)
        publish.ensure()


if __name__ == "__main__":
    main()
