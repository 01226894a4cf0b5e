"""Deployments, as a team uses them: a real server, a real worker, runs that wait, end or are cancelled."""

import contextlib
import json
import shutil
import socket
import sqlite3
import time

import httpx
import pytest

from tests.served import wait_for
from tests.toy import (
    CLEAN,
    LONG_STAGE,
    NEW_DATA,
    PATIENCE_S,
    PROMOTE,
    RETRAIN,
    VERIFY,
    Toy,
    is_one_sentence,
    seconds_until_gone,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.served]
LOCKED = """
import pathlib
tried = pathlib.Path("tried")
if not tried.exists():
    tried.touch()
    raise SystemExit("(sqlite3.OperationalError) database is locked")
pathlib.Path("locked.txt").write_text("done")
"""
BROKEN = """
for number in range(30):
    print("line", number)
raise SystemExit("no such word")
"""
PUBLISH = {
    "cmd": """echo '{"publication": "4e24"}' > publication.json""", "deps": ["raw.txt"], "outs": ["publication.json"]
}  # fmt: skip


# --- services ------------------------------------------------------------------------------------------------------


def test_a_server_and_a_worker_that_run_are_not_started_again(toy):
    before = toy.survivors()
    again = toy.service("server")
    assert (again.returncode, again.stdout) == (0, f"the server runs already: http://127.0.0.1:{toy.port}\n")
    again = toy.service("worker")
    assert (again.returncode, again.stdout) == (0, "the worker runs already\n")
    assert toy.survivors() == before != []


def test_a_page_of_another_server_may_not_tell_this_one_what_to_do(toy):
    def allowed(origin):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        found = httpx.options(f"{toy.url}/deployments/filter", headers=asked).headers
        return found.get("Access-Control-Allow-Origin")

    assert allowed("http://example.com") is None
    assert allowed(f"http://127.0.0.1:{toy.port}") == f"http://127.0.0.1:{toy.port}"


def test_the_deployments_have_their_schedules(toy):
    assert sorted(toy.schedules) == ["promote", "retrain", "retrain-on-new-data", "sweep", "verify"]
    (retrain, nightly), (new_data, interval), (verify, weekly) = (
        toy.schedules[name][0] for name in ("retrain", "retrain-on-new-data", "verify")
    )
    assert (retrain, nightly["cron"], nightly["timezone"]) == (False, "0 3 * * *", "UTC")
    assert (new_data, interval["interval"]) == (True, 600)
    assert (verify, weekly["cron"], weekly["timezone"]) == (True, "0 5 * * 0", "UTC")
    assert toy.schedules["promote"] == toy.schedules["sweep"] == []


def test_deploying_again_leaves_each_deployment_and_automation_once(toy):
    def names(kind):
        return sorted(entry["name"] for entry in toy.post(f"/{kind}/filter"))

    before = names("deployments"), names("automations")
    assert before[1] == ["a run that crashed is started again", "a run without heartbeats has crashed"]
    toy.start("deploy")
    assert (names("deployments"), names("automations")) == before


def test_all_data_lies_under_the_folder_of_prefect(toy):
    assert {"prefect.db", "server.log", "worker.log"} <= {file.name for file in toy.home.iterdir()}
    assert [file for file in toy.person.rglob("*") if "prefect" in str(file.relative_to(toy.person))] == []


def test_params_that_are_not_right_are_neither_deployed_nor_run(checkout):
    params = checkout.folder / "params.yaml"
    right = params.read_text()
    params.write_text(right.replace("learning_rate: 2e-3", "learning_rate: fast"))
    try:
        done = checkout.service("deploy")
        run = checkout.run(RETRAIN)
        state = checkout.ended(run)
    finally:
        params.write_text(right)
    fault = "train.learning_rate: should be a valid number; got 'fast'"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"deploy: params.yaml has 1 fault, nothing was run:\n  {fault}\n"
    assert (state.name, state.message) == ("Refused", f"params.yaml has 1 fault, nothing was run:\n  {fault}")
    assert checkout.tasks(run) == {}
    assert not [line for line in checkout.run_log(run) if "Traceback" in line]


# --- states and logs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_all_kinds(services):
    """A run with a stage for every way to end; and what the log held while a stage still ran."""
    (services.folder / "locked.py").write_text(LOCKED)
    (services.folder / "broken.py").write_text(BROKEN)
    write(
        services.folder,
        long=LONG_STAGE,
        locked={"cmd": "python locked.py", "outs": ["locked.txt"]},
        broken={"cmd": "python broken.py", "outs": ["broken.txt"]},
        after={"cmd": "touch after.txt", "deps": ["broken.txt"], "outs": ["after.txt"]},
    )
    assert services.python("-m", "dvc", "repro", "ingest").returncode == 0
    run, _ = services.start_waiting()
    meanwhile = services.lines(run), (services.folder / "long.txt").exists()
    services.go()
    return run, services.ended(run), meanwhile


def test_every_stage_ends_in_the_state_that_says_what_it_took(toy, of_all_kinds):
    run, state, _ = of_all_kinds
    toy.wait_for_states(run, ingest="Cached", long="Completed", locked="Completed", broken="Failed", after="NotReady")
    assert (state.name, state.message) == (
        "Failed",
        "broken failed, see the output above; not run because of it: after",
    )


def test_a_failed_stage_shows_its_last_lines_in_its_state(toy, of_all_kinds):
    lines = toy.tasks(of_all_kinds[0])["broken"]["state"]["message"].splitlines()
    assert lines[0].startswith("exit code")
    assert "line 29" in lines and "no such word" in lines
    assert "line 0" not in lines


def test_a_line_is_in_the_log_of_its_task_while_the_stage_runs(toy, of_all_kinds):
    run, _, (log, was_done) = of_all_kinds
    assert ("waiting", toy.tasks(run)["long"]["id"]) in log
    assert not was_done


def test_only_what_waiting_may_cure_is_tried_again(toy, of_all_kinds):
    counts = {name: task["run_count"] for name, task in toy.tasks(of_all_kinds[0]).items()}
    assert (counts["locked"], counts["broken"], counts["long"]) == (2, 1, 1)


def test_a_run_leaves_a_table_of_its_stages(toy, of_all_kinds):
    chosen = {"flow_run_id": {"any_": [str(of_all_kinds[0])]}, "key": {"any_": ["stages"]}}
    (found,) = toy.post("/artifacts/filter", artifacts=chosen)
    rows = {row["stage"]: (row["state"], row["how"]) for row in json.loads(found["data"])}
    assert rows["ingest"] == ("Cached", "nothing to do")
    assert rows["broken"][0] == "Failed" and rows["long"][1].startswith("ran in ")


# --- cancelling, limits, one at a time -----------------------------------------------------------------------------


def test_cancelling_ends_a_run_with_its_checkpoint_saved_and_no_process_left_within_10_s(checkout):
    run, family = checkout.start_waiting()
    begun_s = time.monotonic()
    done = checkout.python("-m", "prefect", "flow-run", "cancel", str(run), PREFECT_API_URL=checkout.url)
    assert done.returncode == 0, done.stderr
    seconds_until_gone(family, begun_s + 10 - time.monotonic())
    print(f"measured: cancelled by a command, no process after {time.monotonic() - begun_s:.1f} s")
    assert checkout.processes_of(run) == []
    assert checkout.ended(run, 30).name == "Cancelled"
    assert "saved" in checkout.run_log(run)


def test_a_second_run_waits_or_is_refused_and_one_that_waits_can_be_cancelled(checkout):
    first, _ = checkout.start_waiting()
    second, refused, cancelled = (checkout.run(RETRAIN, when_busy=when) for when in ("wait", "refuse", "wait"))
    state = checkout.ended(refused)
    assert state.name == "Refused"
    assert is_one_sentence(f"{state.message}\n", "works in this checkout already; wait for it, or end it")
    assert checkout.tasks(refused) == {}

    wait_for(lambda: checkout.read(cancelled).state_name == "Running", PATIENCE_S)
    family = checkout.processes_of(cancelled)
    # What the button on Prefect's page sends.
    checkout.post(f"/flow_runs/{cancelled}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    print(f"measured: cancelled as the page does, no process after {seconds_until_gone(family, 10):.1f} s")
    assert checkout.ended(cancelled, 30).name == "Cancelled"

    wait_for(lambda: checkout.read(second).state_name == "Running", PATIENCE_S)
    assert checkout.tasks(second) == {}, "it waits"
    checkout.go()
    assert checkout.ended(first).name == checkout.ended(second).name == "Completed"
    checkout.wait_for_states(second, ingest="Cached", long="Cached")


def test_a_stage_that_takes_longer_than_it_may_is_ended(checkout):
    run, family = checkout.start_waiting(stage_limit_minutes=0.1)
    seconds_until_gone(family, 30)
    assert checkout.ended(run).name == "Failed"
    assert checkout.processes_of(run) == []
    checkout.wait_for_states(run, ingest="Cached", long="TimedOut")
    lines = checkout.tasks(run)["long"]["state"]["message"].splitlines()
    assert lines[0] == "ended after 6 s, the limit of a stage; what was saved is kept" and "saved" in lines


# --- upkeep --------------------------------------------------------------------------------------------------------


def test_new_text_starts_a_run_and_nothing_new_starts_nothing(toy):
    write(toy.folder)
    assert toy.python("-m", "dvc", "repro").returncode == 0
    run = toy.run(NEW_DATA)
    state = toy.ended(run)
    assert (state.name, state.message) == ("Cached", "nothing new under data/source")
    assert toy.tasks(run) == {}

    (toy.folder / "data" / "source" / "more.txt").write_text("three\n")
    assert toy.ended(toy.run(NEW_DATA)).name == "Completed"
    assert (toy.folder / "raw.txt").read_text().startswith("three\n")
    assert toy.python("-m", "dvc", "status").stdout == CLEAN


def test_where_dvc_cannot_tell_what_is_new_its_reason_is_the_message(toy):
    lock = toy.folder / "dvc.lock"
    right = lock.read_text()
    lock.write_text("stages: [")
    try:
        state = toy.ended(toy.run(NEW_DATA))
    finally:
        lock.write_text(right)
    assert state.name == "Refused"
    assert state.message.startswith("`dvc status --json` failed: ") and "dvc.lock' is invalid" in state.message
    assert "Traceback" not in state.message


def test_what_promote_and_verify_print_is_in_their_logs_and_how_they_fail_in_their_states(toy):
    write(toy.folder, publish=PUBLISH)
    (toy.folder / "dvc.lock").unlink(missing_ok=True)  # with stages of other tests
    assert toy.python("-m", "dvc", "repro", "ingest").returncode == 0

    def come_to(deployment, name, *words):
        run = toy.run(deployment)
        state = toy.ended(run)
        lines = toy.run_log(run)
        assert state.name == name
        assert not [line for line in lines if "Traceback" in line]
        for word in words:
            assert word in lines and word in state.message.splitlines(), lines
        return state

    words = "promote: MLflow has no registered model 'gpt2-pipeline' yet; run `dvc repro`"
    assert come_to(PROMOTE, "Failed", words).message.startswith("exit code 1\n")
    come_to(VERIFY, "Completed")
    (toy.folder / "raw.txt").chmod(0o644)
    (toy.folder / "raw.txt").write_text("damaged")
    assert come_to(VERIFY, "Failed", "raw.txt: ingest: changed").message.startswith("exit code 1\n")


# --- bad input -----------------------------------------------------------------------------------------------------


def test_overrides_that_cannot_be_are_refused_by_every_door_before_any_stage(toy):
    fault = {
        "train.no_such": "unknown; params.yaml has no such key",
        "train.seed": "should be a valid integer; got 'x'",
    }
    runs = {key: toy.run(RETRAIN, overrides={key: "x"}) for key in fault}
    for key, run in runs.items():
        state = toy.ended(run)
        assert state.name == "Refused" and state.message.splitlines()[1:] == [f"  {key}: {fault[key]}"]
        assert toy.tasks(run) == {}
        assert not [line for line in toy.run_log(run) if "Traceback" in line]
        done = toy.python("-m", "flows.pipeline", "-S", f"{key}=x")
        assert (done.returncode, done.stderr) == (1, f"flow: {state.message}\n")
    for overrides in ({"train": {"no_such": 1}}, {"train": {"seed": "x"}}):
        with pytest.raises(Exception, match=f"409.*overrides.train.*{next(iter(overrides['train']))}"):
            toy.run(RETRAIN, overrides=overrides)


@pytest.fixture
def alone(tmp_path):
    """A checkout without a server."""
    return Toy(tmp_path / "ein Örtchen")


def refused(toy, *arguments, **more):
    """What `python -m flows.pipeline` says when it refuses, before it has done anything."""
    done = toy.python("-m", "flows.pipeline", *arguments, **more)
    assert done.returncode == 1
    assert not (toy.folder / "raw.txt").exists()
    return done.stderr


@pytest.mark.parametrize("name", ["worker", "deploy"])
def test_without_a_server_there_is_nothing_to_work_for(alone, name):
    done = alone.service(name)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_sentence(done.stderr, f"{name}: no Prefect server answers at {alone.url}", "`make server`")


def test_a_port_in_use_by_another_program_is_refused(alone):
    with socket.socket() as other:
        other.bind(("127.0.0.1", alone.port))
        other.listen()
        done = alone.service("server")
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_sentence(done.stderr, f"port {alone.port}", "in use by another program; end it")
    assert alone.survivors() == []


def test_a_server_that_is_not_there_is_named(alone):
    said = refused(alone, PREFECT_API_URL=alone.url)
    assert is_one_sentence(said, f"flow: no Prefect server answers at {alone.url}", "start it or unset")


def test_a_database_that_another_process_has_locked_is_named(alone):
    alone.home.mkdir()
    with contextlib.closing(sqlite3.connect(alone.home / "prefect.db")) as database:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        words = f"Prefect's database {alone.home / 'prefect.db'} cannot be used (database is locked); end the program"
        assert is_one_sentence(refused(alone), f"flow: {words}")
        served = alone.service("server")
    assert served.returncode == 1
    assert is_one_sentence(served.stderr, f"server: {words}")


@pytest.fixture
def asking(alone, toy):
    """What a run with parameters of its own says in that checkout."""
    override = ("-S", "train.learning_rate=1e-3")
    return lambda: refused(alone, *override, PREFECT_API_URL=toy.url)


@pytest.mark.parametrize("has_git", [True, False])
def test_parameters_of_its_own_need_a_commit(alone, asking, has_git):
    if not has_git:
        shutil.rmtree(alone.folder / ".git")
    assert is_one_sentence(asking(), "has none: `git init && git add . && git commit`")


def test_parameters_of_its_own_need_files_as_they_are_in_the_commit(alone, asking):
    alone.commit()
    (alone.folder / "long.py").write_text("")
    assert is_one_sentence(asking(), "these differ from it: long.py; commit them, or `git stash`")


def test_a_work_tree_that_cannot_be_made_is_told(alone, asking):
    alone.commit()
    (alone.folder / ".trials").write_text("")
    assert is_one_sentence(asking(), ".trials")


def test_a_work_tree_that_git_did_not_finish_is_made_anew(alone, toy):
    alone.commit()
    command = ("-m", "flows.pipeline", "-S", "train.learning_rate=1e-3")
    assert alone.python(*command, PREFECT_API_URL=toy.url).returncode == 0
    (lock,) = (alone.folder / ".trials").glob("trial-*.lock")
    half = lock.with_suffix(".aside")
    half.mkdir()
    (half / ".git").write_text("gitdir: ")
    done = alone.python(*command, PREFECT_API_URL=toy.url)
    assert done.returncode == 0, done.stderr
    assert not half.exists() and not lock.with_suffix("").exists()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_stopping_leaves_no_process_and_again_finds_nothing_to_stop(checkout):
    checkout.start_waiting()
    assert len(checkout.survivors()) >= 6
    assert checkout.service("stop").stdout == "worker: ended\nserver: ended\n"
    assert checkout.survivors() == []
    again = checkout.service("stop")
    assert (again.returncode, again.stdout) == (0, "worker: does not run\nserver: does not run\n")
