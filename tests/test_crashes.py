"""What crashes is started again: flows, workers and servers that are killed, with a real server and a real worker."""

import contextlib
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.served import wait_for
from tests.toy import (
    CLEAN,
    LONG_STAGE,
    NEW_DATA,
    PATIENCE_S,
    RETRAIN,
    Toy,
    is_one_sentence,
    make_project,
    seconds_until_gone,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.served]


def is_by_automation(run):
    return run.created_by.type == "AUTOMATION"


def ids(toy):
    return [run.id for run in toy.runs(RETRAIN)]


def one_did_the_work(toy, known):
    """Prefect may take an event twice, and start two runs: one waits for the other, and finds nothing to do."""
    toy.rest(RETRAIN)
    new = [run.id for run in toy.runs(RETRAIN) if run.id not in known]
    expected = ["Cached"] * (len(new) - 1) + ["Completed"]
    wait_for(lambda: sorted(toy.task_states(run).get("long", "") for run in new) == expected, 10)


def test_a_flow_that_is_killed_is_started_again_as_often_as_it_may_be(checkout):
    parameters = {"when_busy": "refuse", "stage_limit_minutes": 7, "attempts_a_day": 1}
    run, (flow, *stage) = checkout.start_waiting(**parameters)
    known, begun_s = ids(checkout), time.monotonic()
    flow.kill()
    seconds_until_gone(stage, 5)
    assert checkout.ended(run, 30).type == "CRASHED"
    print(f"measured: flow killed, crashed after {time.monotonic() - begun_s:.1f} s")
    again = checkout.next_run(RETRAIN, known)
    flow, *stage = checkout.wait_in_stage(again.id)
    print(f"measured: flow killed, its stage runs again after {time.monotonic() - begun_s:.1f} s")
    assert is_by_automation(again) and again.parameters.items() >= parameters.items()

    known = ids(checkout)
    flow.kill()
    seconds_until_gone(stage, 5)
    last = checkout.next_run(RETRAIN, known)
    state = checkout.ended(last.id)
    assert state.name == "Refused"
    assert is_one_sentence(f"{state.message}\n", "a run crashed, and of 1 attempts within 24 hours none is left")
    assert checkout.tasks(last.id) == {}


def test_a_run_whose_worker_is_killed_ends_and_goes_on_with_a_new_worker(checkout):
    parameters = {"stage_limit_minutes": 3.5, "attempts_a_day": 9}
    run, family = checkout.start_waiting(**parameters)
    known, begun_s = ids(checkout), time.monotonic()
    checkout.kill("worker")
    print(f"measured: worker killed, no process after {seconds_until_gone(family, 5):.1f} s")
    checkout.start("worker")
    checkout.go()
    assert checkout.ended(run, 90).type == "CRASHED"
    print(f"measured: worker killed, crashed after {time.monotonic() - begun_s:.1f} s")
    again = checkout.next_run(RETRAIN, known)
    assert is_by_automation(again) and again.parameters.items() >= parameters.items()
    assert checkout.ended(again.id).name == "Completed"
    one_did_the_work(checkout, known)
    print(f"measured: worker killed, all done after {time.monotonic() - begun_s:.1f} s")
    assert checkout.python("-m", "dvc", "status").stdout == CLEAN


def test_a_machine_that_is_lost_goes_on_once_server_and_worker_are_back(checkout):
    run, family = checkout.start_waiting(attempts_a_day=9)
    known = ids(checkout)
    checkout.kill("server")
    checkout.kill("worker")
    seconds_until_gone(family, 5)
    # As if the run were older: Prefect holds back for 15 minutes what happens to one of less than five.
    with contextlib.closing(sqlite3.connect(checkout.home / "prefect.db")) as database, database:
        earlier = "strftime('%Y-%m-%d %H:%M:%f', timestamp, '-6 minutes')"
        database.execute(f"UPDATE flow_run_state SET timestamp = {earlier} WHERE name = 'Running'")
    checkout.start("server", "worker")
    begun_s = time.monotonic()
    assert checkout.ended(run, 90).type == "CRASHED"
    again = checkout.next_run(RETRAIN, known)
    print(f"measured: machine lost, started again {time.monotonic() - begun_s:.1f} s after server and worker are back")
    assert is_by_automation(again)
    checkout.go()
    assert checkout.ended(again.id).name == "Completed"
    one_did_the_work(checkout, known)


def test_what_new_text_has_started_goes_on_after_a_crash(checkout):
    (checkout.folder / "data" / "source" / "new.txt").write_text(f"{time.time_ns()}\n")
    run = checkout.run(NEW_DATA, attempts_a_day=9)

    def stage_of(run):
        return wait_for(
            lambda: [process for process in checkout.processes_of(run) if "long.py" in process.cmdline()], PATIENCE_S
        )

    stage_of(run)
    known = [run.id for run in checkout.runs(NEW_DATA)]
    flow, *others = sorted(checkout.processes_of(run), key=lambda process: process.create_time())
    flow.kill()
    seconds_until_gone(others, 5)
    again = checkout.next_run(NEW_DATA, known)
    stage_of(again.id)
    checkout.go()
    assert checkout.ended(again.id).name == "Completed"
    assert (checkout.folder / "long.txt").exists()
    checkout.rest(NEW_DATA)


def test_a_flow_that_cannot_be_imported_is_not_started_again(checkout):
    flows, aside = checkout.folder / "flows", checkout.folder / "aside"
    flows.rename(aside)
    try:
        flows.mkdir()
        (flows / "training.py").write_text("import no_such_module")
        run = checkout.run(RETRAIN)
        state = checkout.ended(run)
        (flows / "training.py").unlink()
        flows.rmdir()
    finally:
        aside.rename(flows)
    assert state.type == "CRASHED"
    assert "No module named 'no_such_module'" in "".join(checkout.run_log(run))
    time.sleep(5)
    assert ids(checkout)[-1] == run


def test_with_the_server_killed_the_stages_go_on_and_the_result_is_there(tmp_path):
    here, by_hand = Toy(tmp_path / "ein Örtchen"), make_project(tmp_path / "by hand")
    stages = {"long": LONG_STAGE, "last": {"cmd": "cp long.txt last.txt", "deps": ["long.txt"], "outs": ["last.txt"]}}
    for folder in (here.folder, by_hand):
        write(folder, **stages)
    try:
        here.start("server", "worker", "deploy")
        run = here.run(RETRAIN)
        settings = here.environment | {"PREFECT_API_URL": here.url, "PYTHONPATH": str(by_hand)}
        with subprocess.Popen(
            [sys.executable, "-m", "flows.pipeline"],
            cwd=by_hand, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            family = here.wait_in_stage(run)
            assert "waiting\n" in process.stdout
            here.kill("server")
            begun_s = time.monotonic()
            for folder in (here.folder, by_hand):
                (folder / "go").touch()
            _, stderr = process.communicate(timeout=PATIENCE_S)
        print(f"measured: server killed, `python -m flows.pipeline` ended after {time.monotonic() - begun_s:.1f} s")
        wait_for((here.folder / "last.txt").exists, PATIENCE_S)
        seconds_until_gone(family[1:], PATIENCE_S)  # the flow itself tries for minutes to tell its server of it
        assert is_one_sentence(stderr, "the Prefect server is gone", "`dvc status` does, of trials `dvc exp show`"), (
            stderr
        )
        for folder in (here.folder, by_hand):
            assert (folder / "last.txt").read_text() == "done"
            assert here.python("-m", "dvc", "--cd", str(folder), "status").stdout == CLEAN
    finally:
        stopped = here.service("stop").stdout
    assert stopped == "worker: ended\nserver: does not run\n"
    assert here.survivors() == []


def test_with_the_server_killed_a_trial_goes_on_and_is_kept_and_one_that_had_not_begun_says_why(tmp_path):
    here = Toy(tmp_path / "ein Örtchen")
    write(here.folder, long=LONG_STAGE)
    here.commit()
    try:
        here.start("server")
        with subprocess.Popen(
            [sys.executable, "-m", "flows.pipeline", "--trial", "train.seed=2", "--trial", "train.seed=3"],
            cwd=here.folder, env=here.environment | {"PREFECT_API_URL": here.url},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert "waiting\n" in process.stdout
            here.kill("server")
            (tree,) = [file for file in (here.folder / ".trials").iterdir() if file.is_dir()]
            (tree / "go").touch()
            stdout, stderr = process.communicate(timeout=400)
    finally:
        here.service("stop")
    assert process.returncode == 1
    assert is_one_sentence(stderr, "the Prefect server is gone"), stderr
    assert "flow: trial 2: train.seed=3: the Prefect server was gone before it could begin\n" in stdout
    rows = [line.split() for line in stdout.splitlines()[-2:]]
    assert rows == [["flow:", "train.seed=2", "Completed"], ["flow:", "train.seed=3", "Failed"]]
    assert tree.name in here.python("-m", "dvc", "exp", "list").stdout
