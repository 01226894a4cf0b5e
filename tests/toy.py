"""A project of toy stages with our flows and deployments, and what a server knows of its runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.closure import ROOT
from tests.served import Served, is_final, wait_for

RETRAIN, NEW_DATA = "pipeline/retrain", "retrain-on-new-data/retrain-on-new-data"
VERIFY, PROMOTE = "verify/verify", "promote/promote"
SECTIONS = ["ingest", "clean", "model", "split", "tokenize", "train", "sample", "evaluate", "publish"]
INGEST = {
    "cmd": "echo reading; cat data/source/* > raw.txt", "deps": ["data/source"], "outs": ["raw.txt"], "params": SECTIONS
}  # fmt: skip
# Like training: a checkpoint when interrupted, its end with the flow; a child that must be killed. Done at a file `go`.
LONG = """
import pathlib, subprocess, sys, time
from pipeline import owner
with owner.alone("train"):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", deaf])
    try:
        print("waiting", flush=True)
        while not pathlib.Path("go").exists():
            time.sleep(0.1)
    except KeyboardInterrupt:
        print("saved", flush=True)
        sys.exit(130)
    child.kill()
    pathlib.Path("long.txt").write_text("done")
"""
LONG_STAGE = {"cmd": "python long.py", "deps": ["raw.txt", "turn.txt"], "outs": ["long.txt"]}
CLEAN = "Data and pipelines are up to date.\n"
PATIENCE_S = 120  # on a machine with much else to do


def make_project(folder):
    """A checkout with our flows, and toy stages."""
    (folder / "data" / "source").mkdir(parents=True)
    (folder / "data" / "source" / "words.txt").write_text("one\ntwo\n")
    for name in ("flows", "pipeline"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("prefect.yaml", "params.yaml", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "long.py").write_text(LONG)
    (folder / "turn.txt").write_text("first")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True)
    write(folder)
    return folder


def write(folder, **stages):
    """These stages, and one that reads data/source and every section of params.yaml."""
    (folder / "dvc.yaml").write_text(json.dumps({"stages": {"ingest": INGEST, **stages}}))


def processes(**variables):
    """The processes in whose environment these variables have these values."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and variables.items() <= process.environ().items():
                found.append(process)
    return found


class Toy(Served):
    """A toy project, and its services."""

    def __init__(self, folder):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DVC"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        self.person = folder.parent / "person"
        self.person.mkdir(exist_ok=True)
        ours = {"PATH": path, "PYTHONPATH": str(folder), "HOME": str(self.person), "DVC_NO_ANALYTICS": "1"}
        super().__init__(make_project(folder), clean | ours)
        self.home = folder / ".prefect"
        self.port = int(self.environment["PREFECT_SERVER_API_PORT"])

    def python(self, *command, **more):
        """Run to its end in the checkout, with more in its environment."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder, env=self.environment | more, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def post(self, path, **content):
        """What the server answers to a question that its client does not know."""
        return self.ask(lambda client: client.request("POST", path, json=content).json())

    def read(self, run):
        return self.ask(lambda client: client.read_flow_run(run))

    def next_run(self, deployment, known):
        """The run of the deployment that is none of those, as soon as there is one."""
        return wait_for(lambda: [run for run in self.runs(deployment) if run.id not in known], PATIENCE_S)[0]

    def commit(self):
        """All files, as git knows them."""
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run([*git, "add", "--all"], cwd=self.folder, check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "one"], cwd=self.folder, check=True)

    def tasks(self, run):
        """What the server has of the stages of a run, by name."""
        return {task["name"]: task for task in self.post("/task_runs/filter", flow_runs={"id": {"any_": [str(run)]}})}

    def lines(self, run):
        """The log of a run, and the id of the task that each line belongs to."""
        found = self.post("/logs/filter", logs={"flow_run_id": {"any_": [str(run)]}}, sort="TIMESTAMP_ASC")
        return [(line["message"], line["task_run_id"]) for line in found]

    def run_log(self, run):
        """The whole log of a run that has ended: its last lines come with the end of its process."""
        wait_for(lambda: not self.processes_of(run), PATIENCE_S)
        return [line for line, _ in self.lines(run)]

    def wait_in_stage(self, run):
        """Until the long stage of a run waits; all processes of the run, the flow itself first."""

        def is_there():
            assert not self.read(run).state.is_final(), self.read(run).state
            return "waiting" in [line for line, _ in self.lines(run)]

        wait_for(is_there, PATIENCE_S)
        family = sorted(self.processes_of(run), key=lambda process: process.create_time())
        assert len(family) >= 4, "the flow, DVC, the stage, its child"
        return family

    def start_waiting(self, **parameters):
        """A run in the middle of its long stage, and its processes."""
        run = self.run(RETRAIN, **parameters)
        return run, self.wait_in_stage(run)

    def processes_of(self, run):
        """Every process of a run: all inherit its id."""
        return processes(PREFECT__FLOW_RUN_ID=str(run))

    def rest(self, *deployments):
        """Until no run of these goes on: a server that took an event twice has started two."""
        self.go()

        def is_quiet():
            runs = [run for name in deployments for run in self.runs(name)]
            by_hand = [run for run in runs if run.created_by is None or run.created_by.type != "SCHEDULE"]
            return all(is_final(run.state) for run in by_hand)

        wait_for(is_quiet, PATIENCE_S)

    def recover(self):
        """Undo what a test that failed has left: no server, no worker, a run that others would wait for."""
        for name in ("server", "worker"):
            if not psutil.pid_exists(int((self.home / f"{name}.pid").read_text().split()[0])):
                self.start(name)
        left = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
        for run in self.post("/flow_runs/filter", flow_runs={"state": left}):
            family = self.processes_of(run["id"])
            state = {"type": "CANCELLED", "name": "Cancelled"}  # a crash would start another
            self.post(f"/flow_runs/{run['id']}/set_state", state=state, force=True)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, PATIENCE_S)

    def survivors(self):
        """Every process that one of the services has started, and those themselves."""
        return processes(PREFECT_SERVER_API_PORT=str(self.port))

    def go(self):
        """Let the long stage come to its end."""
        (self.folder / "go").touch()


def seconds_until_gone(family, timeout_s):
    """How long it took until none of the processes was left."""
    begun_s = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout_s)
    assert alive == []
    return time.monotonic() - begun_s


def is_one_sentence(text, *parts):
    return text.count("\n") == 1 and all(part in text for part in parts)
