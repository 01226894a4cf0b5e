"""What the server does by itself: it notices that a run has crashed, and starts it again.

A run that a worker started sends a heartbeat every HEARTBEAT_S. Where they stop, with the machine, the worker or the
process of the run, the run has crashed; where its process alone ends, its worker says so. What crashed is run again by
its deployment, with the same parameters, and goes on from the last checkpoint. How often within a day is counted by
flows/crashed.py. Runs of other flows are left alone: a team's server may have many.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows import crashed, sweep, training, upkeep
from flows.settings import HEARTBEAT_S

SLACK_S = 20  # how late a heartbeat may be, on a machine that is busy; together, within a minute
FINAL = ("Completed", "Cached", "Failed", "Refused", "TimedOut", "Cancelled", "Crashed")
RUN = "prefect.flow-run"


def ours() -> list[AutomationCore]:
    """Both of them."""
    flows: list[Flow[..., Any]] = [
        training.pipeline,
        sweep.sweep,
        upkeep.retrain_on_new_data,
        upkeep.promote,
        upkeep.verify,
    ]
    of_a_deployment_of_ours: list[Any] = [
        {"prefect.resource.role": "deployment"},
        {"prefect.resource.role": "flow", "prefect.resource.name": [flow.name for flow in flows]},
    ]
    heartbeats_stopped = EventTrigger(
        after={f"{RUN}.heartbeat"},
        expect={f"{RUN}.heartbeat", *(f"{RUN}.{state}" for state in FINAL)},
        match={"prefect.resource.id": [f"{RUN}.*"]},
        match_related=of_a_deployment_of_ours,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=HEARTBEAT_S + SLACK_S),
    )
    has_crashed = EventTrigger(
        expect={f"{RUN}.Crashed"},
        match={
            "prefect.resource.id": [f"{RUN}.*"],
            # One that never ran, because its code cannot be loaded, would crash again at once, for ever.
            "prefect.run-count": "!0",
        },
        match_related=of_a_deployment_of_ours,
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    same_parameters = {
        "__prefect_kind": "json",
        "value": {"__prefect_kind": "jinja", "template": "{{ flow_run.parameters | tojson }}"},
    }
    return [
        AutomationCore(
            name="a run without heartbeats has crashed",
            description=f"No heartbeat of a run for {HEARTBEAT_S + SLACK_S} s: its machine, worker or process is gone.",
            trigger=heartbeats_stopped,
            # It is not started again here: the heartbeat of a short run may arrive after its end, and be its last.
            actions=[ChangeFlowRunState.model_validate({"state": "CRASHED", "message": "no heartbeat any more"})],
        ),
        AutomationCore(
            name=crashed.STARTED_BY,
            description="It goes on from its last checkpoint; `attempts_a_day` of the run says how often.",
            trigger=has_crashed,
            actions=[RunDeployment.model_validate({"source": "inferred", "parameters": same_parameters})],
        ),
    ]


def bring_up_to_date() -> list[str]:
    """Make our automations on the server what they are here, and return their names."""
    with get_client(sync_client=True) as client:
        for automation in ours():
            # In place, so that a run that is going on is still watched.
            known = client.read_automations_by_name(automation.name)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in ours()]
