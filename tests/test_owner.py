"""One process at a time in a checkout, gone within a second of whoever started it: real processes, really killed."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import owner
from pipeline.follow import is_running
from tests.tiny import ROOT, Project

# What a stage does, without a stage: hold the lock, say so, wait.
HOLD = "from pipeline import owner, stage\nwith stage.refusals('job'), owner.alone('job'):\n    "
WAIT = HOLD + "import time; print('held', flush=True); time.sleep(60)"
# A parent that starts the job and waits for it, and has not inherited that it should outlive a terminal.
PARENT = (
    "import signal, subprocess, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); sys.exit(subprocess.call({command}))"
)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts Python code in the folder, waits for its first line, and ends it and all its children after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    started = []

    def start_one(*command, **environment):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start_one
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def python(code):
    return (sys.executable, "-c", code)


def holding(process):
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def text():
    return json.loads(owner.LOCK.read_bytes())


def refused(start):
    second = start(*python(WAIT))
    out, err = second.communicate(timeout=20)
    assert second.returncode == 1 and out == "", err
    return err


def gone_after_s(processes, at_most_s=5.0):
    """Seconds until none of them runs any more."""
    began_s = time.monotonic()
    while any(map(is_running, processes)):
        if time.monotonic() - began_s > at_most_s:
            return at_most_s
        time.sleep(0.01)
    return time.monotonic() - began_s


# --- the lock ------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_who_the_first_is(start):
    first = holding(start(*python(WAIT)))
    assert text() == {
        "host": socket.gethostname(),
        "pid": first.pid,
        "stage": "job",
        "started_s": psutil.Process(first.pid).create_time(),
    }
    said = refused(start)
    assert f"job: `python -m pipeline.job` works in this checkout already: process {first.pid} on" in said
    assert re.search(rf"on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d ", said)
    assert f"`kill {first.pid}`" in said
    assert text()["pid"] == first.pid, "the refused one changed nothing"


def test_the_lock_of_a_killed_process_is_taken_over_also_where_its_id_is_in_use_again(start):
    first = holding(start(*python(WAIT)))
    first.kill()
    first.communicate()
    left = text()
    assert left["pid"] == first.pid
    holding(start(*python(WAIT))).kill()
    # The id of a process that runs, and even its start: only the kernel's lock counts.
    owner.LOCK.write_text(json.dumps(left | {"pid": os.getpid(), "started_s": psutil.Process().create_time()}))
    next_one = holding(start(*python(WAIT)))
    assert text()["pid"] == next_one.pid


@pytest.mark.parametrize("content", [b"", b'{"pid": 1', b"[]", b"\xff\xff", b"{}", b'{"host": 3}'])
def test_a_damaged_text_holds_nothing_up(start, tmp_path, content):
    owner.LOCK.parent.mkdir()
    owner.LOCK.write_bytes(content)
    holding(start(*python(WAIT)))


def test_who_ends_in_good_order_leaves_no_name_behind(start):
    for code, status in (("pass", 0), ("raise stage.Refusal('no')", 1), ("raise stage.Interrupted(15, 'x')", 143)):
        process = start(*python(HOLD + code))
        process.communicate(timeout=20)
        assert process.returncode == status
        assert owner.LOCK.read_bytes() == b""


def test_on_another_machine_that_locks_do_not_reach_a_touched_lock_is_respected_and_a_silent_one_taken(start):
    owner.LOCK.parent.mkdir()
    elsewhere = {"host": "elsewhere", "pid": 12, "stage": "train", "started_s": 1.7e9}
    owner.LOCK.write_text(json.dumps(elsewhere))
    patient = "from pipeline import owner; owner.SILENCE_S = 1.5\n" + WAIT
    second = start(*python(patient))
    while second.poll() is None:
        os.utime(owner.LOCK)
        time.sleep(0.2)
    assert "process 12 on elsewhere, since 2023-11-1" in second.stderr.read()
    assert text() == elsewhere
    holding(start(*python(patient)))


def test_an_owner_touches_its_lock(start):
    holding(start(*python("from pipeline import owner; owner.TOUCH_S = 0.1\n" + WAIT)))
    before_ns = owner.LOCK.stat().st_mtime_ns
    time.sleep(1)
    assert owner.LOCK.stat().st_mtime_ns > before_ns


FAMILY = (
    HOLD + "import os, subprocess, time\n"
    "    child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    "    worker = os.fork()\n"
    "    if worker: print('held', child.pid, worker, flush=True)\n"
    "    time.sleep(60)"
)


@pytest.fixture
def family(start):
    """Starts a job with a child, in a session of its own as the follower is, and a fork, as of a data loader."""
    born = []

    def begin(before=""):
        job = start(*python(before + FAMILY))
        _, *pids = job.stdout.readline().split()
        born.extend(psutil.Process(int(pid)) for pid in pids)
        return job, *born

    yield begin
    for process in born:
        with contextlib.suppress(psutil.Error):
            process.kill()


def test_neither_a_forked_worker_nor_a_started_process_keeps_the_lock_of_a_killed_owner(start, family):
    job, child, worker = family("from pipeline import owner; owner._watch_in_forks = lambda: None\n")  # it lives on
    job.kill()
    holding(start(*python(WAIT)))
    assert is_running(child) and is_running(worker)


def test_a_forked_worker_ends_with_its_owner(family):
    job, _, worker = family()
    job.kill()
    assert gone_after_s([worker]) < 1


# --- the parent ----------------------------------------------------------------------------------------------------


def wait_for_children(process, number):
    """All below a process, once there are so many and the job holds the lock."""
    for _ in range(400):
        below = psutil.Process(process.pid).children(recursive=True)
        if len(below) >= number and owner.LOCK.exists() and owner.LOCK.read_bytes():
            return below
        time.sleep(0.05)
    raise AssertionError("the job did not start")


@pytest.mark.parametrize("blocked", [False, True], ids=["its errors are read", "its errors go into a full pipe"])
def test_started_by_hand_it_ends_with_its_parent(start, blocked):
    job = "import os; os.set_blocking(2, False)\n" if blocked else ""
    job += "while True:\n    try: os.write(2, b'x' * 4096)\n    except BlockingIOError: break\n" if blocked else ""
    job += "os.set_blocking(2, True)\n" if blocked else ""
    parent = start(*python(PARENT.format(command=list(python(job + WAIT)))))
    below = wait_for_children(parent, 1)
    parent.kill()
    assert gone_after_s(below) < 1


def test_what_it_started_ends_with_it(start):
    parent = start(*python(PARENT.format(command=list(python(FAMILY)))))
    below = wait_for_children(parent, 3)
    parent.kill()
    assert gone_after_s(below) < 1


@pytest.mark.parametrize("how", ["nohup", "setsid"])
def test_told_to_outlive_its_parent_it_does(start, how):
    parent = start(*python(PARENT.format(command=[how, *python(WAIT)])))
    (job,) = wait_for_children(parent, 1)
    parent.kill()
    assert gone_after_s([job], at_most_s=1.0) == 1.0
    job.kill()


@pytest.mark.parametrize("killed", ["dvc", "shell"])
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_started_by_dvc_it_ends_with_dvc_and_with_the_shell_between(start, shell, killed):
    # `; true` keeps the shell between, which it otherwise leaves to chance and version.
    command = [shell, "-c", f"{shlex.quote(sys.executable)} -c {WAIT!r}; true".replace("\\n", "\n")]
    script = f"import os, subprocess; subprocess.call({command}, env=os.environ | {{'DVC_STAGE': 'job'}})"
    dvc = start(*python(script))
    between, job = wait_for_children(dvc, 2)
    (dvc if killed == "dvc" else between).kill()
    assert gone_after_s([between, job]) < 1


def test_started_through_the_flow_it_ends_with_the_flow(start):
    dvc = f"import os, subprocess; subprocess.call({python(WAIT)}, env=os.environ | {{'DVC_STAGE': 'job'}})"
    flow = (
        "import os; from flows.process import Executor; from pipeline import owner\n"
        f"Executor().run({python(dvc)}, os.environ | {{owner.FLOW: str(os.getpid())}}, print)"
    )
    process = start(*python(flow))
    below = wait_for_children(process, 2)
    process.kill()
    assert gone_after_s(below) < 1


def test_started_by_torchrun_it_ends_with_it(start):
    worker = f"import subprocess; subprocess.call({python(WAIT)}, env={{**__import__('os').environ, 'TORCHELASTIC_RUN_ID': '1'}}, start_new_session=True)"  # noqa: E501
    process = start(*python(worker))
    below = wait_for_children(process, 1)
    process.kill()
    assert gone_after_s(below) < 1


@pytest.mark.parametrize("variable", [{"DVC_STAGE": "job"}, {owner.FLOW: "1234567"}], ids=["dvc", "flow"])
def test_an_orphan_that_comes_to_life_too_late_ends_at_once(start, variable):
    """Its parent died before it could look: the one that it has now is in another session, or is not the flow."""
    orphan = start(*python(WAIT), **variable)  # a new session: as if the parent were init
    out, err = orphan.communicate(timeout=20)
    assert orphan.returncode == owner.ORPHANED and out == ""
    assert "what started this process is gone" in err
    assert not owner.LOCK.exists()


def test_a_parent_that_is_process_1_is_a_parent_like_any_other():
    """In a container it may be, and nothing is ever given to another parent there."""
    assert owner._is_intact([os.getppid()])
    assert not owner._is_intact([1 if os.getppid() != 1 else 2])


# --- the trainer under DVC -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_outlives_a_killed_dvc_by_a_second_and_the_next_ends_with_the_same_bytes(tmp_path):
    undisturbed = Project(tmp_path / "undisturbed", num_epochs=20)
    assert undisturbed.run("pipeline.train").returncode == 0
    project = Project(tmp_path / "project", num_epochs=20)
    assert project.run("dvc", "init", "--quiet", "--no-scm").returncode == 0
    # This shell stays between DVC and the trainer.
    surroundings = {"SHELL": "/bin/sh", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    repro = ["dvc", "repro", "--single-item", "train"]
    first = project.start(*repro, **surroundings)
    below = []
    while not any(is_running(process) and "pipeline.follow" in process.cmdline() for process in below):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
        below = psutil.Process(first.pid).children(recursive=True)

    (follower,) = [process for process in below if "pipeline.follow" in process.cmdline()]
    for process in below:
        process.suspend()  # so that it is still at work when the others have been refused
    by_hand = project.run("pipeline.train")
    assert by_hand.returncode == 1 and "works in this checkout already" in by_hand.stderr
    second = project.run(*repro, **surroundings)
    assert second.returncode != 0
    assert f"(PID {first.pid})" in second.stderr, "DVC itself refuses a second one at once, naming the first"

    for process in below:
        process.resume()
    first.kill()
    assert gone_after_s([process for process in below if process != follower]) < 1
    assert gone_after_s(below) < 2, "the follower is killed too, but has to wait for its turn on a busy machine"
    first.communicate()
    assert not (project.folder / "models").exists()
    done = project.run(*repro, **surroundings)
    assert done.returncode == 0, done.stderr
    assert project.hashes() == undisturbed.hashes()
