"""The real pipeline on a schedule and after a crash: a real server, a real worker, small parameters."""

import hashlib
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.served import Served, is_final, served, wait_for
from tests.test_end_to_end import STAGES, Clone

pytestmark = [pytest.mark.slow, pytest.mark.served, pytest.mark.timeout(1200)]
RETRAIN = "pipeline/retrain"
RESULT = ("models/best/model.safetensors", "models/last/model.safetensors", "reports/train.jsonl")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("scheduled") / "a clone ü")


@pytest.fixture(scope="module")
def services(clone: Clone) -> Iterator[Served]:
    with served(clone.folder, clone.environment) as services:
        for other in ("retrain-on-new-data/retrain-on-new-data", "verify/verify"):
            services.ask(lambda client, name=other: client.pause_deployment(client.read_deployment_by_name(name).id))
        yield services


def finished(services: Served) -> list[Any]:
    return [run for run in services.runs(RETRAIN) if is_final(run.state)]


def test_every_minute_the_first_run_trains_the_others_find_nothing_to_do_and_a_pause_is_a_pause(
    services: Served,
) -> None:
    from prefect.client.schemas.schedules import IntervalSchedule

    deployment = services.ask(lambda client: client.read_deployment_by_name(RETRAIN).id)
    every_minute = [(IntervalSchedule(interval=timedelta(minutes=1)), True)]
    services.ask(lambda client: client.create_deployment_schedules(deployment, every_minute))
    # Those that were due while the first one trained have waited for it. Two more are due after that.
    first, *others = wait_for(
        lambda: len(runs := finished(services)) > 2 and runs[-2].start_time > runs[0].end_time and runs, 600
    )
    services.wait_for_states(first.id, **dict.fromkeys(STAGES, "Completed"))
    for run in others:
        assert run.state_name == "Completed"
        services.wait_for_states(run.id, **dict.fromkeys(STAGES, "Cached"))
        assert run.start_time < first.end_time or run.total_run_time < timedelta(seconds=60)

    chosen = {"artifacts": {"flow_run_id": {"any_": [str(first.id)]}}}
    found = services.ask(lambda client: client.request("POST", "/artifacts/filter", json=chosen)).json()
    left = {one["key"]: one["data"] for one in found}
    assert set(left) == {"stages", "training", "result"}
    assert float(left["training"]) == 100
    for part in ("data:image/png;base64,", "perplexity", "/runs/", "/#/models/gpt2-pipeline/versions/1"):
        assert part in left["result"], part

    services.ask(lambda client: client.pause_deployment(deployment))
    wait_for(lambda: all(is_final(run.state) for run in begun(services)), 60)
    num_begun = len(begun(services))
    time.sleep(75)
    assert len(begun(services)) == num_begun
    services.ask(lambda client: client.resume_deployment(deployment))
    wait_for(lambda: len(begun(services)) > num_begun, 100)
    services.ask(lambda client: client.pause_deployment(deployment))
    wait_for(lambda: all(is_final(run.state) for run in begun(services)), 60)


def begun(services: Served) -> list[Any]:
    return [run for run in services.runs(RETRAIN) if run.start_time is not None]


def test_a_worker_killed_while_it_trains_is_seen_and_a_new_run_ends_with_the_same_bytes(
    clone: Clone, services: Served, tmp_path: Path
) -> None:
    longer: dict[str, dict[str, object]] = {"train": {"num_epochs": 6, "checkpoint_interval_steps": 20}}
    undisturbed = Clone(tmp_path / "undisturbed")
    for one in (clone, undisturbed):
        one.change(longer)
    undisturbed.run("python", "-m", "dvc", "repro", "train")

    killed = services.run(RETRAIN)
    known = {run.id for run in services.runs(RETRAIN)}
    wait_for(lambda: list(clone.folder.glob(".runs/*/checkpoint-*")), 120)
    services.kill("worker")
    begun_s = time.monotonic()
    services.start("worker")
    crashed = services.ended(killed, 90)
    assert crashed.name == "Crashed", crashed
    wait_for(lambda: "train: going on after step" in services.log("worker"), 120)
    print(f"measured: worker killed, training goes on after {time.monotonic() - begun_s:.1f} s")
    again = [run.id for run in services.runs(RETRAIN) if run.id not in known]
    assert {services.ended(run).name for run in again} == {"Completed"}
    # Prefect may take an event twice, and start two runs: the second waits for the first, and finds nothing to do.
    assert [services.task_states(run)["train"] for run in again].count("Completed") == 1
    for file in RESULT:
        assert digest(clone.folder / file) == digest(undisturbed.folder / file), file


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
