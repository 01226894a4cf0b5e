"""The flow, run as people run it: `python -m flows.pipeline` in a project of toy stages, with real DVC and Prefect."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from flows.process import Executor, Stopped
from pipeline import worktree
from pipeline.follow import is_running
from tests.closure import ROOT

TOY = """
stages:
  last: {cmd: cat upper/upper.txt reversed.txt > last.txt, deps: [upper, reversed.txt], outs: [last.txt]}
  first: {cmd: echo begun; cp source/words.txt first.txt, deps: [source], outs: [first.txt]}
  upper: {cmd: mkdir -p upper; tr a-z A-Z < first.txt > upper/upper.txt, deps: [first.txt], outs: [upper]}
  reversed: {cmd: python reverse.py, deps: [first.txt, reverse.py], outs: [reversed.txt]}
"""
REVERSE = """
import pathlib
pathlib.Path("reversed.txt").write_text(pathlib.Path("first.txt").read_text()[::-1])
"""
WAIT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
try:
    print("waiting", flush=True)
    time.sleep(300)
except KeyboardInterrupt:
    print("saved", flush=True)
    sys.exit(130)
"""
FLOW = [sys.executable, "-m", "flows.pipeline"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """What a person's shell has, no server configured, and one Prefect database for all tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DVC"))}
    # Stages of `dvc repro` say `python`; the flow finds its own.
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    home = str(tmp_path_factory.mktemp("home") / "a folder? 100%25 ü")
    return clean | {"PYTHONPATH": str(ROOT), "PATH": path, "PREFECT_HOME": home, "DVC_NO_ANALYTICS": "1"}


@pytest.fixture(scope="session")
def with_server(environment):
    """The same, with a Prefect server running and configured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The default of a flow without a server, so that `ended_in` reads the same database in both cases.
    database = f"sqlite+aiosqlite:///file:{quote(environment['PREFECT_HOME'])}/prefect.db?uri=true"
    settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment | settings, start_new_session=True, **quiet) as server:
        url = f"http://127.0.0.1:{port}/api"
        try:
            for _ in range(600):
                with suppress(OSError), urllib.request.urlopen(f"{url}/health") as answer:
                    assert answer.status == 200
                    break
                time.sleep(0.2)
            yield environment | {"PREFECT_API_URL": url}
        finally:
            os.killpg(server.pid, signal.SIGTERM)


@pytest.fixture
def new_project(tmp_path, environment):
    def new(name="project"):
        folder = tmp_path / name
        (folder / "source").mkdir(parents=True)
        (folder / "source" / "words.txt").write_text("one\ntwo\n")
        (folder / "reverse.py").write_text(REVERSE)
        (folder / "dvc.yaml").write_text(TOY)
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
        dvc(folder, environment, "init", "--quiet")
        return folder

    return new


def dvc(folder, environment, *arguments):
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def flow(folder, environment):
    return subprocess.run(FLOW, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def ended_in(environment, of_flow, **of_tasks):
    """Whether the server knows the last flow run's state, and its tasks' states, by these names."""
    for _ in range(50):  # it learns of task states through events, a moment later
        with sqlite3.connect(Path(environment["PREFECT_HOME"]) / "prefect.db") as database:
            ((run, state),) = database.execute("SELECT id, state_name FROM flow_run ORDER BY created DESC LIMIT 1")
            tasks = dict(database.execute("SELECT name, state_name FROM task_run WHERE flow_run_id = ?", [run]))
        if (state, {name: tasks.get(name) for name in of_tasks}) == (of_flow, of_tasks):
            return True
        time.sleep(0.2)
    print(state, tasks)
    return False


@pytest.mark.slow
def test_the_flow_leaves_what_dvc_repro_leaves_and_then_finds_nothing_to_do(new_project, environment):
    by_flow, by_dvc = new_project("by flow"), new_project("by dvc")
    dvc(by_dvc, environment, "repro")
    ended = flow(by_flow, environment)
    assert ended.returncode == 0, ended.stderr
    for file in ("dvc.lock", "last.txt", "upper/upper.txt"):
        assert (by_flow / file).read_bytes() == (by_dvc / file).read_bytes()
    assert dvc(by_flow, environment, "status") == "Data and pipelines are up to date.\n"
    names = ["first", "upper", "reversed", "last"]
    assert ended_in(environment, "Completed", **dict.fromkeys(names, "Completed"))
    lines = ended.stdout.splitlines()
    assert lines.count("begun") == 1
    assert [line for line in lines if line.startswith("Running")] == [f"Running stage '{name}':" for name in names]
    assert not [line for line in lines if "git add" in line or "dvc push" in line]

    again = flow(by_flow, environment)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == "flow: 4 Cached (first, upper, reversed, last)"
    assert ended_in(environment, "Completed", **dict.fromkeys(names, "Cached"))


@pytest.mark.slow
def test_a_stage_that_dvc_restores_from_its_cache_ends_cached(new_project, with_server):
    folder = new_project()
    dvc(folder, with_server, "repro")
    words = folder / "source" / "words.txt"
    words.write_text("three\n")
    dvc(folder, with_server, "repro")
    words.write_text("one\ntwo\n")
    (folder / "reverse.py").write_text(REVERSE + "# this one has to run\n")
    ended = flow(folder, with_server)
    assert "Stage 'first' is cached - skipping run, checking out outputs" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "flow: 3 Cached (first, upper, last); 1 Completed (reversed)"
    assert (folder / "last.txt").read_text() == "ONE\nTWO\n\nowt\neno"


@pytest.mark.slow
def test_a_failing_stage_fails_the_flow_and_what_waits_for_it_does_not_run(new_project, with_server):
    folder = new_project()
    (folder / "reverse.py").write_text("raise SystemExit('no such word')")
    ended = flow(folder, with_server)
    assert ended.returncode == 1
    assert ended.stderr == "flow: reversed failed, see the output above; not run because of it: last\n"
    assert "no such word" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "flow: 2 Completed (first, upper); 1 Failed (reversed); 1 NotReady (last)"
    assert (folder / "upper").exists()
    assert not (folder / "last.txt").exists()
    assert ended_in(with_server, "Failed", upper="Completed", reversed="Failed", last="NotReady")


def history(folder, environment):
    command = [sys.executable, "-m", "flows.history"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_flow_run_is_tagged_with_its_commit_and_with_the_result_that_it_came_to(new_project, with_server):
    folder = new_project()
    publish = """{cmd: 'echo "{\\"publication\\": \\"4e24\\"}" > publication.json', outs: [publication.json]}"""
    (folder / "dvc.yaml").write_text(f"stages: {{publish: {publish}}}")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "add", "--all"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], cwd=folder, check=True)
    assert flow(folder, with_server).returncode == 0
    told = json.loads(history(folder, with_server).stdout.splitlines()[-1])
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout
    assert told["state"] == "Completed"
    assert told["tags"] == {"git.commit": head.strip(), "git.dirty": "false", "pipeline.publication": "4e24"}

    (folder / "dvc.yaml").write_text("stages: {publish: {cmd: exit 1, outs: [publication.json]}}")
    assert flow(folder, with_server).returncode == 1
    told = json.loads(history(folder, with_server).stdout.splitlines()[-1])
    assert told["state"] == "Failed"
    assert told["tags"] == {"git.commit": head.strip(), "git.dirty": "true"}, "it came to no result"


def test_where_no_flow_ever_ran_its_history_is_empty_and_asking_makes_nothing(tmp_path, environment):
    told = history(tmp_path, environment | {"PREFECT_HOME": str(tmp_path / ".prefect")})
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_history_that_no_server_tells_is_refused_in_one_sentence(tmp_path, environment):
    told = history(tmp_path, environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert told.returncode == 1
    assert told.stderr.startswith("history: no Prefect server answers (") and told.stderr.count("\n") == 1


def interrupt(folder, environment, send):
    """Start the flow, send it a signal while a stage runs, and return how it ended, when nothing of it is left."""
    process = subprocess.Popen(
        FLOW, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    )
    for line in process.stdout:
        if line == "waiting\n":
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # DVC, the stage, its child, and the temporary server where there is one
    try:
        begun_s = time.monotonic()
        send(process.pid)
        stdout, stderr = process.communicate(timeout=60)
        assert time.monotonic() - begun_s < 20
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
    finally:
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    assert "saved\n" in stdout
    assert ended_in(environment, "Crashed")
    return process.returncode, stderr


@pytest.mark.slow
def test_ctrl_c_lets_the_stage_save_and_leaves_no_process_behind_not_even_the_temporary_server(
    new_project, environment
):
    folder = new_project()
    (folder / "reverse.py").write_text(WAIT)
    # The terminal sends it to the whole process group.
    ended = interrupt(folder, environment, lambda pid: os.killpg(pid, signal.SIGINT))
    assert ended == (130, "flow: interrupted\n")


@pytest.mark.slow
def test_after_a_termination_the_flow_goes_on_where_it_stopped(new_project, with_server):
    folder = new_project()
    (folder / "reverse.py").write_text(WAIT)
    ended = interrupt(folder, with_server, lambda pid: os.kill(pid, signal.SIGTERM))
    assert ended == (143, "flow: terminated\n")
    (folder / "reverse.py").write_text(REVERSE)
    assert flow(folder, with_server).stdout.splitlines()[-1] == (
        "flow: 2 Cached (first, upper); 2 Completed (reversed, last)"
    )


def test_a_graph_that_cannot_be_translated_is_refused_before_anything_starts(tmp_path, environment):
    (tmp_path / "dvc.yaml").write_text("stages: {every: {foreach: [a], do: {cmd: 'echo ${item}'}}}")
    ended = flow(tmp_path, environment)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("flow: dvc.yaml holds what the flow cannot translate:\n  stage every: `foreach`")
    assert [file.name for file in tmp_path.iterdir()] == ["dvc.yaml"]


def test_a_server_that_is_not_there_is_refused_in_one_sentence(tmp_path, environment):
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: touch ran}}")
    ended = flow(tmp_path, environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("flow: no Prefect server answers at http://127.0.0.1:9/api")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


# --- the process group ---------------------------------------------------------------------------------------------


def run_in_background(code):
    """An executor that runs Python code, its lines so far, and the thread; waits for the first line."""
    executor, lines, started = Executor(), [], threading.Event()

    def show(line):
        lines.append(line)
        started.set()

    command = [sys.executable, "-u", "-c", code]
    thread = threading.Thread(target=executor.run, args=(command, dict(os.environ), show))
    thread.start()
    assert started.wait(30)
    return executor, lines, thread


def test_lines_are_shown_one_by_one_whatever_bytes_they_hold():
    shown = []
    code = r"import sys; sys.stdout.buffer.write(b'plain\r\nbad \xff\n\nno end'); sys.stdout.flush(); sys.exit(7)"
    assert Executor().run([sys.executable, "-c", code], dict(os.environ), shown.append) == 7
    assert shown == ["plain", "bad �", "", "no end"]


def test_what_a_command_says_as_an_error_is_shown_too():
    shown = []
    Executor().run(
        [sys.executable, "-c", "import sys; print('trouble', file=sys.stderr)"], dict(os.environ), shown.append
    )
    assert shown == ["trouble"]


@pytest.mark.parametrize(
    "what_waits",
    [
        "worktree.held(pathlib.Path(sys.argv[1]), 'here', wait=True, tell=tell).__enter__()",
        "Executor().run(['sh', '-c', 'echo up; exec sleep 10'], dict(os.environ), tell)",
    ],
    ids=["for a lock", "for a command"],
)
def test_a_signal_that_does_not_wake_what_waits_is_heard_all_the_same(tmp_path, what_waits):
    """One that comes just before a call that blocks, or in another thread, does not end the call."""
    code = f"""
import os, pathlib, signal, sys, threading, time
from flows.process import Executor
from pipeline import worktree

def hear(number, frame):
    os._exit(7)

def tell(line):
    print(line, flush=True)
    threading.Thread(target=strike).start()

def strike():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

signal.signal(signal.SIGTERM, hear)
{what_waits}
"""
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with worktree.held(tmp_path / "lock", "here"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (7, 1, "")


def test_stopping_interrupts_and_waits_for_the_command_to_tidy_up():
    executor, lines, thread = run_in_background(
        "import time\ntry: print('up'); time.sleep(60)\nexcept KeyboardInterrupt: time.sleep(0.2); print('tidy')"
    )
    executor.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert lines == ["up", "tidy"]


def test_stopping_kills_what_does_not_listen_and_everything_it_started(monkeypatch):
    monkeypatch.setattr("flows.process.GRACE_S", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); {}; print({}); time.sleep(60)"
    child = deaf.format("pass", "'up'")
    code = deaf.format(
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-u', '-c', {child!r}])", "p.pid"
    )
    executor, lines, thread = run_in_background(code)
    while len(lines) < 2:
        time.sleep(0.01)
    grandchild = psutil.Process(int(next(line for line in lines if line != "up")))
    executor.stop()
    thread.join(5)
    assert not thread.is_alive()
    psutil.wait_procs([grandchild], timeout=5)
    assert not is_running(grandchild)


def test_nothing_starts_after_stopping(tmp_path):
    executor = Executor()
    executor.stop()
    with pytest.raises(Stopped):
        executor.run(["touch", str(tmp_path / "ran")], dict(os.environ), print)
    assert list(tmp_path.iterdir()) == []
