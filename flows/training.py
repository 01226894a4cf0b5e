"""The pipeline as a flow of Prefect: one task a stage of dvc.yaml, each brought up to date through DVC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Annotated, Any

import pydantic
from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows import crashed, overrides, place, report, stages, talk
from flows.dag import Dag, downstream, read_dag
from flows.place import Place, WhenBusy
from flows.process import Executor
from pipeline import check, origin, recorded
from pipeline.stage import Refusal
from pipeline.tracking import PUBLICATION

try:
    # The form on Prefect's page. A run itself checks what it was asked for, and has words for what is wrong.
    Overrides: Any = Annotated[overrides.form(), pydantic.SkipValidation]
except Refusal:  # every run says it: raised here, it would be a traceback in the log of a worker
    Overrides = dict[str, Any]
RETRY_DELAYS_S: list[float] = [5, 30]  # before a stage is tried again, where waiting may help
CLEAN = "Data and pipelines are up to date."  # what `dvc status` prints then

ATTEMPTS_A_DAY = 3
Minutes = Annotated[float, pydantic.Field(gt=0)]

States = dict[str, State[Any]]


# DVC is the cache. Results are not persisted: Prefect would pickle them.
@task(cache_policy=NO_CACHE, persist_result=False, retries=len(RETRY_DELAYS_S), retry_delay_seconds=RETRY_DELAYS_S,
      retry_condition_fn=stages.is_passing)  # fmt: skip
def bring(name: str, where: Place, executor: Executor, limit_s: float | None) -> State[Any]:
    """Bring one stage up to date."""
    return stages.bring_up_to_date(name, where, executor, limit_s)


@flow(name="pipeline", persist_result=False)
def pipeline(
    overrides: Overrides | None = None,
    when_busy: WhenBusy = "wait",
    stage_limit_minutes: Minutes | None = None,
    attempts_a_day: int = ATTEMPTS_A_DAY,
) -> Any:
    """Bring every stage up to date: in the checkout, or with parameters of its own in a work tree beside it.

    Args:
        overrides: parameters that differ from params.yaml. Left out, the checkout is brought up to date; given, this
            happens in a work tree beside it, and the result is an experiment of DVC.
        when_busy: wait or refuse, where another run works in the same place.
        stage_limit_minutes: a stage that takes longer is ended, with its checkpoint kept.
        attempts_a_day: how often a run that crashed is started again within 24 hours.
    """
    return refused(lambda _: _pipeline(overrides, when_busy, stage_limit_minutes), attempts_a_day)


def refused(work: Callable[[bool], Any], attempts_a_day: int = ATTEMPTS_A_DAY) -> Any:
    """Work, and what a user can cause and mend becomes a state with one message, without a traceback.

    Args:
        work: is told whether this run goes on for one that crashed.
        attempts_a_day: how often a run may do so within 24 hours.
    """
    talk.end_with_worker()
    talk.say_once_how_it_failed()
    try:
        return work(crashed.is_again(attempts_a_day))
    except Refusal as problem:
        get_run_logger().error("%s", problem)
        return Failed(name="Refused", message=str(problem))


def _pipeline(asked: Any, when_busy: WhenBusy, limit_minutes: float | None) -> Any:
    dag = read_dag()
    overrides.form()  # params.yaml is right
    flat = overrides.flat(asked) if asked is not None else {}
    with place.beside(flat, when_busy) if flat else place.checkout(when_busy) as where:
        return work(dag, where, Executor(), limit_minutes, flat)


def work(
    dag: Dag,
    where: Place,
    executor: Executor,
    limit_minutes: float | None,
    asked: Mapping[str, Any],
    alone: Callable[[str], Any] = lambda _: nullcontext(),
) -> State[Any]:
    """Bring every stage up to date there, keep the result, and leave what there is to read.

    Args:
        alone: what to hold while a stage runs, by its name.

    Returns:
        Completed with the evaluation of the result as its data, or Failed with the names of the stages that failed.

    Raises:
        Refusal: DVC says that a stage is not up to date, or cannot keep the result.
    """
    states = bring_all(dag, where, executor, limit_minutes, alone)
    failed = failures(states)
    is_published = "evaluate" in states and "publish" in states and states["publish"].is_completed()
    shown = report.asked_of_mlflow(where) if is_published else None
    if not failed:
        _refuse_stale(where)
        if where.experiment:
            place.save(where)
    with talk.only_showing():
        talk.tag(_tags(states, where))
        report.publish(states, where, asked, shown)
    talk.say(summary(states))
    if failed:
        return Failed(message=explain(dag, failed))
    return Completed(message=summary(states), data=report.measured(where) if "evaluate" in dag else {})


def bring_all(
    dag: Dag,
    where: Place,
    executor: Executor,
    limit_minutes: float | None,
    alone: Callable[[str], Any],
) -> States:
    """Bring every stage up to date, in order; the final state of each."""
    states: States = {}
    if where.experiment is None:
        check.mend_lock()
        check.refuse_obstacles()
    try:
        for name, upstream in dag.items():
            named = bring.with_options(name=name, task_run_name=name)
            limit_s = 60 * limit_minutes if limit_minutes else None
            with alone(name):
                states[name] = named(
                    name, where, executor, limit_s, wait_for=[states[other] for other in upstream], return_state=True
                )
            _raise_our_mistakes(states[name])
    except BaseException:  # Ctrl-C, SIGTERM, cancelled
        executor.stop()
        raise
    return states


def failures(states: Mapping[str, State[Any]]) -> list[str]:
    """The stages that failed; those that wait for them did not run at all."""
    return [name for name, state in states.items() if state.is_failed()]


def summary(states: Mapping[str, State[Any]]) -> str:
    """One line: how many stages ended in which state, and their names."""
    ended: dict[str, list[str]] = {}
    for name, state in states.items():
        ended.setdefault(str(state.name), []).append(name)
    return "; ".join(f"{len(names)} {kind} ({', '.join(names)})" for kind, names in ended.items())


def explain(dag: Dag, failed: list[str]) -> str:
    """One line: which stages failed, and which did not run because they wait for one of those."""
    held = {other for name in failed for other in downstream(dag, name)}
    consequence = f"; not run because of it: {', '.join(name for name in dag if name in held)}" if held else ""
    return f"{' and '.join(failed)} failed, see the output above{consequence}"


def _refuse_stale(where: Place) -> None:
    """After all, DVC has the last word.

    Raises:
        Refusal: it says that a stage is not up to date.
    """
    status = recorded.dvc("--cd", str(where.folder), "status").strip()
    if status != CLEAN:
        raise Refusal(f"every stage ran, but `dvc status` says that not all is up to date:\n{status}")


def _tags(states: States, where: Place) -> dict[str, str]:
    """The commit and, where publishing came to its end, the result.

    It is what leads `python -m pipeline.audit` from the flow run to MLflow and back.
    """
    tags = dict(origin.commit())
    if "publish" in states and states["publish"].is_completed():
        tags[PUBLICATION] = report.result_of(where, "publish", "publication.json")["publication"]
    if where.experiment:
        tags["dvc.experiment"] = where.experiment
    return tags


def _raise_our_mistakes(state: State[Any]) -> None:
    """Raise what a task raised: a failed stage returns a state, so an exception is a fault of ours."""
    if state.is_failed() or state.is_crashed():
        problem = state.result(raise_on_failure=False)
        if isinstance(problem, BaseException):
            raise problem
