"""Several parameter sets, each as a run of the pipeline in a work tree of its own, and a table that ranks them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Annotated, Any

import httpx
import pydantic
from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed
from ruamel.yaml import YAML

from flows import overrides, place, talk, training
from flows.dag import Dag, downstream, read_dag
from flows.overrides import Flat
from flows.process import Executor
from flows.training import ATTEMPTS_A_DAY, Minutes, Overrides
from pipeline import stage
from pipeline.stage import Refusal


@flow(name="sweep", persist_result=False)
def sweep(
    trials: list[Overrides],
    at_once: Annotated[int, pydantic.Field(ge=1)] = 1,
    stage_limit_minutes: Minutes | None = None,
    attempts_a_day: int = ATTEMPTS_A_DAY,
) -> Any:
    """Run the pipeline with each of several parameter sets, and rank the results by validation loss.

    Args:
        trials: for each run the parameters that differ from params.yaml.
        at_once: so many runs at a time. Together they need that many times the memory of one.
        stage_limit_minutes: a stage that takes longer is ended, with its checkpoint kept.
        attempts_a_day: how often a sweep that crashed is started again within 24 hours.
    """
    return training.refused(lambda _: _sweep(trials, at_once, stage_limit_minutes), attempts_a_day)


def _sweep(trials: Sequence[Any], at_once: int, limit_minutes: float | None) -> Any:
    dag = read_dag()
    asked = [overrides.flat(trial) for trial in trials]
    for number, trial in enumerate(asked):
        overrides.applied(trial)
        if trial in asked[:number]:
            raise Refusal(f"two trials are the same: {described(trial)}")
    if not asked:
        raise Refusal("no trials: name the parameters of one or more")
    states = _run_all(dag, asked, at_once, limit_minutes)
    rows = ranked(asked, states)
    with talk.only_showing():
        create_table_artifact(rows, key="ranking", description="the trials by their validation loss")
    for row in rows:
        talk.say("  ".join(str(cell) for cell in row.values()))
    failed = [described(trial) for trial, state in zip(asked, states, strict=True) if not state.is_completed()]
    if failed:
        return Failed(message=f"{len(failed)} of {len(asked)} trials failed: {'; '.join(failed)}")
    return Completed(message=f"the best of {len(asked)} trials: {rows[0]['parameters']}")


def _run_all(dag: Dag, asked: Sequence[Flat], at_once: int, limit_minutes: float | None) -> list[State[Any]]:
    """Run all trials, each as a flow run with a page of its own; one that fails stops no other."""
    locks, executors = shared(dag, asked), [Executor() for _ in asked]
    ended: dict[int, State[Any]] = {}

    def run(number: int) -> State[Any]:
        name = f"trial {number + 1}: {described(asked[number])}"

        @flow(name="pipeline", flow_run_name=lambda: name, persist_result=False)
        def trial(overrides: Flat) -> Any:
            def work(_: object) -> Any:
                with place.beside(overrides, "wait") as where:
                    return training.work(
                        dag, where, executors[number], limit_minutes, overrides, locks[number].__getitem__
                    )

            ended[number] = training.refused(work)
            return ended[number]

        try:
            state: State[Any] = trial(asked[number], return_state=True)  # type: ignore[assignment]
        except httpx.HTTPError:  # of its end, which is known here
            if number not in ended:
                ended[number] = Failed(message="the Prefect server was gone before it could begin")
                talk.say(f"{name}: {ended[number].message}")
            return ended[number]
        return state

    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(copy_context().run, run, number) for number in range(len(asked))]
        try:
            return [run.result() for run in runs]
        except BaseException:  # Ctrl-C, SIGTERM, cancelled
            pool.shutdown(wait=False, cancel_futures=True)
            with ThreadPoolExecutor(len(executors)) as stops:  # each may take the time that a user waits for all
                list(stops.map(Executor.stop, executors))
            raise


def shared(dag: Dag, asked: Sequence[Flat]) -> list[dict[str, threading.Lock]]:
    """For each trial and stage a lock: the same one where the stage would do the same work in both.

    That is where all parameters that it and the stages before it read are the same, whoever asked for them. Whoever
    comes second finds what the first one made in DVC's cache.
    """
    stages = stage.read_stages()
    reads = {
        name: {key.split(".")[0] for key in stages[name].get("params", []) if isinstance(key, str)} for name in dag
    }
    for name in dag:
        for other in downstream(dag, name):
            reads[other] |= reads[name]
    locks: dict[tuple[str, str], threading.Lock] = {}
    found = []
    for trial in asked:
        params = YAML(typ="safe", pure=True).load(overrides.applied(trial))
        works = {name: json.dumps({key: params[key] for key in sorted(reads[name])}, default=str) for name in dag}
        found.append({name: locks.setdefault((name, work), threading.Lock()) for name, work in works.items()})
    return found


def ranked(asked: Sequence[Flat], states: Sequence[State[Any]]) -> list[dict[str, Any]]:
    """A row a trial: those that came to a result by their validation loss, then the others."""
    found: list[tuple[float, dict[str, Any]]] = []
    for trial, state in zip(asked, states, strict=True):
        row: dict[str, Any] = {"rank": "", "parameters": described(trial), "validation loss": ""}
        row |= {"95 % interval": "", "verdict": "", "experiment": "", "state": state.name}
        loss, result = float("inf"), state.result() if state.is_completed() else None
        if isinstance(result, Mapping) and result:
            loss, (low, high) = result["validation"]["loss"], result["validation"]["loss_ci95"]
            row |= {
                "validation loss": round(loss, 4),
                "95 % interval": f"{low:.4f} to {high:.4f}",
            }
            row |= {"verdict": result["verdict"], "experiment": result["experiment"]}
        found.append((loss, row))
    rows = [row for _, row in sorted(found, key=lambda one: one[0])]
    for rank, row in enumerate(rows, 1):
        row["rank"] = rank if row["validation loss"] else ""
    return rows


def described(trial: Flat) -> str:
    """The parameters of a trial in a line."""
    return ", ".join(f"{key}={value}" for key, value in trial.items()) or "params.yaml as it is"
