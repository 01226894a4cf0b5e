"""A run that crashed is started again, but not for ever."""

from __future__ import annotations

from datetime import UTC, timedelta
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.runtime import deployment, flow_run
from prefect.types import DateTime

from pipeline.stage import Refusal


def refuse_too_many(attempts_a_day: int) -> None:
    """Refuse to go on for a run that crashed, where as many attempts as allowed did so within a day.

    Raises:
        Refusal: there were too many.
    """
    if deployment.id is None:
        return
    with get_client(sync_client=True) as client:
        created_by = client.read_flow_run(UUID(flow_run.id)).created_by
        if created_by is None or created_by.type != "AUTOMATION":
            return
        runs = client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(
                deployment_id=filters.FlowRunFilterDeploymentId(any_=[UUID(deployment.id)]),
                expected_start_time=filters.FlowRunFilterExpectedStartTime(
                    after_=DateTime.now(UTC) - timedelta(days=1)
                ),
            )
        )
    num_attempts = sum(run.created_by is not None and run.created_by.type == "AUTOMATION" for run in runs)
    if num_attempts > attempts_a_day:
        raise Refusal(
            f"a run crashed, and of {attempts_a_day} attempts within 24 hours none is left; find out why (the logs of "
            "its runs tell), then start it by hand: it goes on from its last checkpoint"
        )
