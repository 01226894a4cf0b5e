"""The campaign itself: faults strike where they should, and what goes wrong cannot pass for a success."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter

import pytest

from chaos import campaign
from chaos.campaign import Outcome, attempt, plan, table
from chaos.faults import FAULTS, Fault, flip
from chaos.project import Reference, differences, published
from chaos.server import Server

# --- the fault library -----------------------------------------------------------------------------------------------

WRITER = """
import os, sys
for number in range(4):
    with open(f"{number}.txt", "wb", buffering=0) as file:
        written = file.write(b"12345678")
        os.fsync(file.fileno())
    print(number, written, flush=True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return campaign.compiled(tmp_path_factory.mktemp("library"))


def run(folder, library, script, **variables):
    """Run a script as `python -m writer` in a folder, with the fault library."""
    (folder / "writer.py").write_text(script)
    places = {"CHAOS_ROOT": str(folder / "out"), "CHAOS_LOG": str(folder / "log.txt"), "LD_PRELOAD": str(library)}
    (folder / "out").mkdir()
    return subprocess.run(
        [sys.executable, "-B", "-m", "writer"], cwd=folder / "out", capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(folder), "CHAOS_MODULE": "writer"} | places | variables,
    )  # fmt: skip


def calls(folder):
    """The calls that the library noted."""
    return [line.split()[2] for line in (folder / "log.txt").read_text().splitlines()]


def sizes(folder):
    return {file.name: file.stat().st_size for file in (folder / "out").iterdir()}


def test_every_call_that_changes_a_file_is_counted(tmp_path, library):
    assert run(tmp_path, library, WRITER, CHAOS_MODE="trace").returncode == 0
    assert calls(tmp_path) == ["open64", "write", "fsync"] * 4


@pytest.mark.parametrize(("at", "left"), [(1, {}), (2, {"0.txt": 4}), (3, {"0.txt": 8}), (5, {"0.txt": 8, "1.txt": 4})])
def test_a_process_is_killed_inside_the_call_that_was_asked_for(tmp_path, library, at, left):
    assert run(tmp_path, library, WRITER, CHAOS_MODE="kill", CHAOS_AT=str(at)).returncode == -9
    assert sizes(tmp_path) == left
    assert len(calls(tmp_path)) == 1


def test_a_full_disk_stays_full(tmp_path, library):
    script = """
for number in range(4):
    try:
        with open(f"{number}.txt", "wb", buffering=0) as file:
            file.write(b"12345678")
    except OSError as problem:
        print(problem.errno, end=" ")
"""
    assert run(tmp_path, library, script, CHAOS_MODE="full", CHAOS_AT="4").stdout == "28 28 28 "
    assert sizes(tmp_path) == {"0.txt": 8, "1.txt": 0}


def test_a_disk_error_is_one_call_that_fails(tmp_path, library):
    done = run(tmp_path, library, WRITER, CHAOS_MODE="error", CHAOS_AT="6")
    assert "[Errno 5] Input/output error" in done.stderr
    assert calls(tmp_path) == ["fsync"]


def test_short_writes_take_half(tmp_path, library):
    done = run(tmp_path, library, WRITER, CHAOS_MODE="short", CHAOS_AT="4")
    assert done.stdout.split() == ["0", "8", "1", "4", "2", "4", "3", "4"]


def test_other_processes_and_other_places_are_left_alone(tmp_path, library):
    done = run(tmp_path, library, WRITER, CHAOS_MODE="kill", CHAOS_AT="1", CHAOS_MODULE="another")
    assert done.returncode == 0
    shutil.rmtree(tmp_path / "out")
    assert run(tmp_path, library, WRITER, CHAOS_MODE="kill", CHAOS_AT="1", CHAOS_WITHIN="7.txt").returncode == 0
    assert not (tmp_path / "log.txt").exists()


def test_databases_and_weights_are_written_through_it(tmp_path, library):
    script = """
import sqlite3, numpy
from safetensors.numpy import save_file
with sqlite3.connect("x.db") as database:
    database.execute("CREATE TABLE t (x)")
save_file({"w": numpy.zeros(99)}, "x.safetensors")
"""
    done = run(tmp_path, library, script, CHAOS_MODE="trace")
    assert done.returncode == 0, done.stderr
    noted = [line.split()[2:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert ["pwrite64", str(tmp_path / "out/x.db")] in noted
    assert "fdatasync" in calls(tmp_path)
    assert [call for call, path in noted if ".tmp" in path][-1] == "write"  # safetensors writes beside, and renames


def test_the_clock_can_be_set_back(tmp_path, library):
    script = "import datetime; print(datetime.date.today(), int(__import__('time').time()))"
    [now, _], [then, _] = (
        run(place, library, script, **shift).stdout.split()
        for place, shift in ((tmp_path / "a", {}), (tmp_path / "b", {"CHAOS_CLOCK_S": "-8640000"}))
        if not place.mkdir()
    )
    assert then < now


# --- plan and table --------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_plan():
    faults = list(FAULTS.values())
    assert plan(200, 7, faults) == plan(200, 7, faults) != plan(200, 8, faults)
    assert plan(200, 7, faults)[:50] == plan(50, 7, faults)


def test_a_campaign_has_every_fault_and_follows_the_weights():
    faults = list(FAULTS.values())
    counts = Counter(fault.name for fault, _ in plan(2000, 1, faults))
    assert set(counts) == set(FAULTS)
    assert {fault.name for fault, _ in plan(len(faults), 1, faults)} == set(FAULTS)
    assert counts["kill-in-checkpoint"] > 3 * counts["umask-077"]


def test_a_try_is_repeated_by_its_fault_and_seed():
    fault, seed = plan(40, 1, list(FAULTS.values()))[25]
    assert plan(1, seed, [fault]) == [(fault, seed)]


def test_every_fault_says_what_it_does():
    for fault in FAULTS.values():
        assert fault.about.endswith(".") and fault.weight > 0, fault.name


def test_the_table_adds_up_and_counts_only_what_struck():
    struck = Outcome("a", 1, struck=True, recovered=True, identical=True, recovery_s=2.5)
    outcomes = [
        struck,
        dataclasses.replace(struck, fault="b", refused=True, recovery_s=9.0),
        dataclasses.replace(struck, identical=False, problem="A SILENT DIFFERENCE"),
        Outcome("b", 1, recovery_s=3.0),
        Outcome("c", 1, not_here="no compiler"),
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(outcomes).splitlines()]
    assert lines[2:] == [
        ["a", "2", "2", "2", "1", "0", "1", "2.5 s"],
        ["b", "2", "1", "1", "1", "1", "0", "9.0 s"],
        ["c", "not run", "", "", "", "", "", ""],
        ["all", "4", "3", "3", "2", "1", "1", "9.0 s"],
    ]


# --- a try -----------------------------------------------------------------------------------------------------------

STAGE = """
import os, pathlib
pathlib.Path("models").mkdir(exist_ok=True)
beside = pathlib.Path("models/.last.partial")
beside.write_text("weights")
beside.replace("models/last")
"""
TABLES = """
CREATE TABLE runs (run_uuid, status, artifact_uri, lifecycle_stage); CREATE TABLE metrics (run_uuid, key, step, value);
CREATE TABLE params (run_uuid, key, value); CREATE TABLE datasets (name, digest);
CREATE TABLE model_versions (name, version, status, source, run_id);
CREATE TABLE registered_model_aliases (name, alias, version);
CREATE TABLE logged_models (status, artifact_location, lifecycle_stage);
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory, library):
    """A project of one stage that writes one file, run undisturbed."""
    reference = Reference(tmp_path_factory.mktemp("campaign"), library)
    (reference.folder / "pipeline").mkdir(parents=True)
    (reference.folder / "pipeline" / "train.py").write_text(STAGE)
    (reference.folder / "dvc.yaml").write_text(
        "stages: {train: {cmd: python -m pipeline.train, outs: [models/last]}}\n"
    )
    (reference.folder / ".dvc").mkdir()
    (reference.folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    with contextlib.closing(sqlite3.connect(reference.folder / "mlflow.db")) as database:
        database.executescript(TABLES)
    reference.run()
    return reference


def one_try(reference, tmp_path, cause):
    return attempt(reference, Server(tmp_path / "server", tmp_path), tmp_path / "try", Fault("planted", 1, cause), 1)


def test_a_fault_from_which_the_stage_recovers_is_a_success(small, tmp_path):
    def cause(trial, _):
        trial.prepare("train")
        assert not (trial.project / "models/last").exists()
        return trial.strike("kill", "pipeline.train", within=".last.partial")[0]

    outcome = one_try(small, tmp_path, cause)
    assert outcome.problem == ""
    assert outcome.struck and outcome.recovered and outcome.identical and outcome.recovery_s > 0
    assert not (tmp_path / "try").exists()


def test_a_planted_silent_difference_is_a_failure_and_its_folder_is_kept(small, tmp_path):
    def cause(trial, _):
        trial.prepare()
        trial.run("python", "-m", "dvc", "repro")  # DVC notes size and time
        flip(trial.project / "models/last", trial.random)
        return True

    outcome = one_try(small, tmp_path, cause)
    assert outcome.recovered and not outcome.identical  # `dvc repro` says that all is well
    assert "SILENT DIFFERENCE" in outcome.problem and "models/last" in outcome.problem
    assert "SILENT DIFFERENCE" in (tmp_path / "try" / "log.txt").read_text()
    assert (tmp_path / "try" / "project" / "models").is_dir()


def test_a_fault_that_does_not_strike_is_no_success(small, tmp_path):
    def cause(trial, _):
        trial.prepare()  # nothing is stale, so no stage runs
        return trial.strike("kill", "pipeline.train")[0]

    outcome = one_try(small, tmp_path, cause)
    assert (outcome.struck, outcome.recovered, outcome.identical) == (False, False, False)
    assert outcome.ending == "did not strike"


def test_what_is_wrong_in_mlflow_or_beside_the_outputs_is_a_difference(small, tmp_path):
    project = tmp_path / "project"
    small.copy(project, [])
    assert differences(small.result, small.result_of(project)) == []
    (project / "models" / ".last.partial").touch()
    thing = next(project.glob(".dvc/cache/files/md5/??/*"))
    thing.chmod(0o600)
    thing.write_text("other")
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
        database.execute("INSERT INTO runs VALUES ('r', 'RUNNING', '', 'active')")
        database.commit()
    found = differences(small.result, small.result_of(project))
    assert [line.split(":")[0] for line in found] == [
        "MLflow",
        "objects of DVC's cache that are not what their name says",
        "unfinished files beside outputs",
    ]


def test_a_point_that_is_there_twice_is_a_difference(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.executescript(TABLES)
        database.execute("INSERT INTO runs VALUES ('r', 'FINISHED', ?, 'active')", (str(tmp_path / "none"),))
        database.execute("INSERT INTO metrics VALUES ('r', 'loss', 1, 0.5)")
        database.commit()
        once = published(tmp_path / "mlflow.db")
        database.execute("INSERT INTO metrics VALUES ('r', 'loss', 1, 0.5)")
        database.commit()
    assert differences(once, published(tmp_path / "mlflow.db")) != []


def test_an_interrupted_campaign_counts_what_it_did(small, tmp_path, monkeypatch):
    def cause(trial, _):
        trial.prepare("train")
        os.kill(os.getpid(), signal.SIGINT)
        return trial.strike("kill", "pipeline.train", within=".last.partial")[0]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(campaign, "prepare", lambda folder: small)
    monkeypatch.setattr(campaign, "FAULTS", {"planted": Fault("planted", 1, cause)})
    before = signal.getsignal(signal.SIGINT)
    try:
        code = campaign.run(5, 1, lanes=1, only=None, table_file=tmp_path / "table.md")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    about, _, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert about.startswith("1 tries, seed 1") and lines[-1].startswith("| all | 1 | 1 | 1 | 1 |")


NUM_TRIES, SEED = 30, 1  # what `make chaos` runs


@pytest.mark.slow
@pytest.mark.timeout(2400)  # ten minutes on an idle machine, and here other tests run beside it
def test_a_campaign_on_the_real_pipeline_ends_with_the_same_bytes(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = campaign.run(NUM_TRIES, SEED, lanes=2, only=None, table_file=tmp_path / "table.md")
    assert code == 0, capfd.readouterr().out
    every = (tmp_path / "table.md").read_text().splitlines()[-1].strip("| ").split(" | ")
    tries, struck, recovered, identical = map(int, every[1:5])
    assert tries == NUM_TRIES and struck >= NUM_TRIES - 2
    assert struck == recovered == identical
