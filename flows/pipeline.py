"""The pipeline as a Prefect flow: one task a stage of dvc.yaml, each brought up to date through DVC.

    python -m flows.pipeline [-S train.learning_rate=1e-4]...
    python -m flows.pipeline --trial "train.learning_rate=1e-3" --trial "train.learning_rate=3e-3 train.seed=2"

The result is the one that `dvc repro` leaves. Stages run one at a time, in the order of dvc.yaml's graph, since DVC
holds one lock for the whole repository. A stage that DVC found up to date, or restored from its cache, ends in the
state Cached, one that ran in Completed, one that failed in Failed; what waits for a failed stage does not run. With
parameters of its own (-S) the run happens in a work tree beside the checkout, and its result is an experiment of DVC.
PREFECT_API_URL names the Prefect server to report to; without it the one of `make server`, where it runs, or a
temporary one, with its database under .prefect/.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from flows import settings
from flows.dag import read_dag
from pipeline import check, stage

if TYPE_CHECKING:
    from prefect import Flow


def main() -> None:
    """Run the flow once. Exit codes: 0 all up to date, 1 refused or a stage failed, 130 or 143 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="a parameter of this run that differs from params.yaml, such as train.learning_rate=1e-4",
    )  # fmt: skip
    parser.add_argument(
        "--trial", action="append", default=[], metavar='"KEY=VALUE ..."', dest="trials",
        help="one run of several with parameters of their own; the end is a table that ranks them",
    )  # fmt: skip
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="trials at a time")
    parser.add_argument(
        "--when-busy", choices=("wait", "refuse"), default="wait", help="another run works there already; trials wait"
    )
    parser.add_argument("--stage-limit-minutes", type=float, help="end a stage that takes longer")
    arguments = parser.parse_args()
    if arguments.trials and arguments.when_busy == "refuse":
        parser.error("--when-busy refuse: trials always wait for a run that works in the same place")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in a pipe, too
    settings.configure()
    # Default handlers, also when we were started with SIGINT ignored (in the background of a script): what is
    # ignored here would be ignored in every stage too, and none could be asked to save and stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    with stage.refusals("flow"):
        read_dag()  # before anything starts
        from flows import overrides

        overrides.form()  # params.yaml is right
        asked = overrides.parsed(arguments.overrides)
        trials = [asked | overrides.parsed(shlex.split(trial)) for trial in arguments.trials]
        for one in trials or [asked]:
            overrides.applied(one) if one else check.refuse_obstacles()
        _reach_server()
        limit = {"stage_limit_minutes": arguments.stage_limit_minutes}
        if trials:
            from flows.sweep import sweep

            _run(sweep, trials=trials, at_once=arguments.at_once, **limit)
        else:
            from flows.training import pipeline

            _run(pipeline, overrides=asked or None, when_busy=arguments.when_busy, **limit)


def _run(flow: Flow[..., Any], **parameters: Any) -> None:
    """Run a flow; where its server is gone at the end, say so and exit.

    Raises:
        Refusal: it did not come to its end.
    """
    import httpx
    from prefect.exceptions import ParameterTypeError

    logging.raiseExceptions = False  # lines that the server did not take: that it is gone is told below
    try:
        outcome: Any = flow(**parameters, return_state=True)
    except ParameterTypeError as problem:
        raise stage.Refusal(str(problem)) from None
    except httpx.HTTPError as problem:
        print(
            f"flow: the Prefect server is gone, so it does not know how this run ended ({problem}); `dvc status` does, "
            "of trials `dvc exp show`",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # Prefect would try for minutes to tell that server what it still has
    if outcome.is_failed() or outcome.is_crashed():
        if isinstance(outcome.data, BaseException):  # a fault of ours
            raise outcome.data
        raise stage.Refusal(str(outcome.message))


def _reach_server() -> None:
    """Make sure of a Prefect server before any stage runs: the configured one, or a temporary one.

    Raises:
        Refusal: none answers.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        settings.refuse_locked_database()
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


def _terminate(number: int, frame: object) -> NoReturn:
    print("flow: terminated", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
