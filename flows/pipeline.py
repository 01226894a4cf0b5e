"""The pipeline as a Prefect flow: one task a stage of dvc.yaml, each brought up to date through DVC.

    python -m flows.pipeline

The result is the one that `dvc repro` leaves. Tasks wait for each other as the graph of dvc.yaml says, and run one at
a time, since DVC holds one lock for the whole repository. A stage that DVC found up to date, or restored from its
cache, ends in the state Cached, one that ran in Completed, one that failed in Failed; what waits for a failed stage
does not run. PREFECT_API_URL names the Prefect server to report to; without it a temporary one is started, with its
database under .prefect/.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote
from uuid import UUID

from flows.dag import Dag, downstream, read_dag
from flows.process import Executor
from pipeline import check, origin, owner, publish, stage
from pipeline.tracking import PUBLICATION

if TYPE_CHECKING:
    from prefect import State

TAIL_LINES = 20  # of a failed stage's output, kept in the message of its state

# DVC's advice to whoever typed `dvc repro`, last of all it prints; after every stage it would drown the rest.
EPILOGUE = {
    "To track the changes with git, run:",
    "Use `dvc push` to send your updates to remote storage.",
    "Data and pipelines are up to date.",
}


def main() -> None:
    """Run the flow once. Exit codes: 0 all up to date, 1 refused or a stage failed, 130 or 143 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in a pipe, too
    configure()
    # Default handlers, also when we were started with SIGINT ignored (in the background of a script): what is
    # ignored here would be ignored in every stage too, and none could be asked to save and stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    with stage.refusals("flow"):
        dag = read_dag()
        check.mend_lock()
        check.refuse_obstacles()
        _reach_server()
        states = run(dag)
        print(f"flow: {_summary(states)}")
        failed = [name for name, state in states.items() if state.is_failed()]
        if failed:
            raise stage.Refusal(_explain(dag, failed))


def run(dag: Dag) -> dict[str, State[Any]]:
    """Run the flow and return the final state of every stage's task."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.task_runners import ThreadPoolTaskRunner

    executor = Executor()

    # DVC is the cache. Results are not persisted: Prefect would pickle them.
    @task(cache_policy=NO_CACHE, persist_result=False)
    def bring(name: str) -> State[Any]:
        return bring_up_to_date(name, executor)

    states: dict[str, State[Any]] = {}
    made_from = origin.commit()
    one_at_a_time: Any = ThreadPoolTaskRunner(max_workers=1)

    @flow(name="pipeline", task_runner=one_at_a_time, persist_result=False)
    def pipeline() -> list[Any]:
        futures: dict[str, Any] = {}
        try:
            for name, upstream in dag.items():
                named = bring.with_options(name=name, task_run_name=name)
                futures[name] = named.submit(name, return_state=False, wait_for=[futures[other] for other in upstream])
            for name, future in futures.items():
                future.wait()
                states[name] = future.state
        except BaseException:  # Ctrl-C, SIGTERM
            executor.stop()
            raise
        _tag(made_from, states)
        return list(futures.values())  # the flow's state is made of theirs: one failed, and it is Failed

    outcome = pipeline(return_state=True)
    for state in (*states.values(), outcome):
        _raise_our_mistakes(state)
    return states


def _tag(made_from: dict[str, str], states: dict[str, State[Any]]) -> None:
    """Tag this flow run with the commit and, where publishing came to its end, with the result.

    It is what leads `python -m pipeline.audit` from the flow run to MLflow and back.
    """
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    tags = dict(made_from)
    if "publish" in states and states["publish"].is_completed():
        tags[PUBLICATION] = publish.published()[1]["publication"]
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), tags=[*flow_run.tags, *(f"{key}={tags[key]}" for key in tags)])


def bring_up_to_date(name: str, executor: Executor) -> State[Any]:
    """Let DVC bring one stage up to date, and say in the state's name what it took."""
    from prefect.logging import get_run_logger
    from prefect.states import Completed, Failed

    log = get_run_logger()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    ran = epilogue = False
    start_s = time.monotonic()

    def show(line: str) -> None:
        nonlocal ran, epilogue
        ran = ran or line == f"Running stage '{name}':"  # what DVC prints before a command, and only then
        epilogue = epilogue or line in EPILOGUE
        if not epilogue:
            tail.append(line)
            print(line)
            log.info("%s", line)

    # The interpreter of the flow, whether or not its environment is activated; and lines as they are written.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", owner.FLOW: str(os.getpid())}
    code = executor.run([sys.executable, "-m", "dvc", "repro", "--single-item", name], environment, show)
    if code != 0:
        return Failed(message=f"exit code {code}\n" + "\n".join(tail))
    if ran:
        return Completed(message=f"ran in {time.monotonic() - start_s:.1f} s")
    return Completed(name="Cached", message="nothing to do")


def configure() -> None:
    """What Prefect reads when it is imported: data in this folder, no telemetry, and no console output beside ours."""
    home = os.environ.setdefault("PREFECT_HOME", str(Path.cwd() / ".prefect"))
    defaults = {
        # Prefect would put the folder into the URL as it is, where `%` and `?` mean something else.
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{quote(home)}/prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # task logs go to the server; we print the same lines
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # making the database takes 15 s on two cores
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _reach_server() -> None:
    """Make sure of a Prefect server before any stage runs: the configured one, or a temporary one.

    Raises:
        Refusal: none answers.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        print("flow: starting a temporary Prefect server (PREFECT_API_URL is not set)")
    # Ctrl-C reaches our whole process group. A server that ended with it could not take our last states, so it
    # inherits a mask that holds the interrupt back; it is ended by a signal of its own when we exit.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except RuntimeError as failure:
        problem = failure
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if problem is not None:
        if url:
            raise stage.Refusal(f"no Prefect server answers at {url} ({problem}); start it or unset PREFECT_API_URL")
        home = os.environ["PREFECT_HOME"]
        raise stage.Refusal(f"no temporary Prefect server could be started ({problem}); its data is in {home}")


def _raise_our_mistakes(state: State[Any]) -> None:
    """Raise what a task or the flow raised: a failed stage returns a state, so an exception is a fault of ours."""
    if state.is_failed() or state.is_crashed():
        problem = state.result(raise_on_failure=False)
        if isinstance(problem, BaseException):
            raise problem


def _summary(states: dict[str, State[Any]]) -> str:
    """One line: how many stages ended in which state, and their names."""
    ended: dict[str, list[str]] = {}
    for name, state in states.items():
        ended.setdefault(str(state.name), []).append(name)
    return "; ".join(f"{len(names)} {kind} ({', '.join(names)})" for kind, names in ended.items())


def _explain(dag: Dag, failed: list[str]) -> str:
    """One line: which stages failed, and which did not run because they wait for one of those."""
    held = {other for name in failed for other in downstream(dag, name)}
    consequence = f"; not run because of it: {', '.join(name for name in dag if name in held)}" if held else ""
    return f"{' and '.join(failed)} failed, see the output above{consequence}"


def _terminate(number: int, frame: object) -> NoReturn:
    print("flow: terminated", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
