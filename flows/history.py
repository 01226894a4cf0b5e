"""What Prefect knows of the runs of our flow: their tags say which commit ran, and which result came of it.

    python -m flows.history

Prints a JSON object a line, the oldest run first: id, name, state, tags. `pipeline.audit` asks for it as a program, for
nothing under pipeline/ knows Prefect. Exit codes: 0 printed, also where no flow has run here yet; 1 no server answers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import settings
from pipeline import stage

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

PAGE = 200  # a server answers with no more at once


def flow_runs() -> Iterator[dict[str, Any]]:
    """Every run of the flow that has tags of ours.

    Raises:
        Refusal: no server answers.
    """
    if "PREFECT_API_URL" not in os.environ and not Path(os.environ["PREFECT_HOME"]).exists():
        return  # asking would make a database
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
            if problem is None:
                yield from _told(client)
                return
    except RuntimeError as failure:  # of the temporary server
        problem = failure
    raise stage.Refusal(f"no Prefect server answers ({problem}), so the flow runs cannot be told; see PREFECT_API_URL")


def _told(client: SyncPrefectClient) -> Iterator[dict[str, Any]]:
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    ours, num_seen = FlowFilter(name=FlowFilterName(any_=["pipeline"])), 0
    while True:
        page = client.read_flow_runs(
            flow_filter=ours, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=PAGE, offset=num_seen
        )
        for run in page:
            tags = dict(tag.split("=", 1) for tag in run.tags if "=" in tag)
            if "git.commit" in tags:
                yield {"id": str(run.id), "name": run.name, "state": run.state_name, "tags": tags}
        num_seen += len(page)
        if len(page) < PAGE:
            return


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.history", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    settings.configure()
    with stage.refusals("history"):
        for run in flow_runs():
            print(json.dumps(run, sort_keys=True))


if __name__ == "__main__":
    main()
