"""A run that crashed is started again, but not for ever."""

from __future__ import annotations

from datetime import UTC, timedelta
from itertools import pairwise
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import deployment, flow_run
from prefect.types import DateTime

from pipeline.stage import Refusal

STARTED_BY = "a run that crashed is started again"  # the automation
# Prefect may take an event twice, and start two runs. No run crashes so soon after it was made.
ONE_EVENT = timedelta(seconds=3)


def is_again(attempts_a_day: int) -> bool:
    """Whether this run goes on for one that crashed.

    Raises:
        Refusal: as many attempts as allowed did so within a day.
    """
    if deployment.id is None:
        return False
    with get_client(sync_client=True) as client:
        if not _is_by_ours(client.read_flow_run(UUID(flow_run.id))):
            return False
        now = DateTime.now(UTC)
        runs = client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(
                deployment_id=filters.FlowRunFilterDeploymentId(any_=[UUID(deployment.id)]),
                expected_start_time=filters.FlowRunFilterExpectedStartTime(
                    after_=now - timedelta(days=1), before_=now + timedelta(minutes=1)
                ),
            )
        )
    made = sorted(run.created for run in runs if _is_by_ours(run) and run.created)
    num_attempts = 1 + sum(later - earlier > ONE_EVENT for earlier, later in pairwise(made))
    if num_attempts > attempts_a_day:
        raise Refusal(
            f"a run crashed, and of {attempts_a_day} attempts within 24 hours none is left; find out why (the logs of "
            "its runs tell), then start it by hand: it goes on from its last checkpoint"
        )
    return True


def _is_by_ours(run: FlowRun) -> bool:
    by = run.created_by
    return by is not None and by.type == "AUTOMATION" and by.display_value == STARTED_BY
