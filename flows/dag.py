"""dvc.yaml as a graph of stages: who waits for whom.

An edge goes from stage A to stage B where an output, metric or plot of A is a dependency of B, contains one or lies
inside one: the rule of DVC itself (tests hold the edges equal to DVC's own). What this reader cannot translate, it
refuses by the stage's name, so that the flow never runs something else than `dvc repro` would.
"""

import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import stage
from pipeline.stage import Refusal

# Every key here means the same to `dvc repro --single-item STAGE` as to `dvc repro`, or nothing to either.
TRANSLATED = {"cmd", "deps", "outs", "metrics", "plots", "params", "desc", "meta", "always_changed"}

Dag = Mapping[str, tuple[str, ...]]


def read_dag(file: Path = Path("dvc.yaml")) -> Dag:
    """The stages that each stage waits for, by name, in an order in which they can run.

    Where the graph leaves the order open, it is that of the file.

    Raises:
        Refusal: with one line for every thing that cannot be translated, or for a cycle.
    """
    stages = stage.read_stages(file)
    faults = [fault for name, definition in stages.items() for fault in _untranslatable(name, definition)]
    if faults:
        raise Refusal(f"{file} holds what the flow cannot translate:\n" + "\n".join(f"  {f}" for f in faults))
    outputs = {name: list(_paths(definition, "outs", "metrics", "plots")) for name, definition in stages.items()}
    dag = {
        name: tuple(
            other
            for other in stages
            if any(_overlap(out, dep) for out in outputs[other] for dep in _dependencies(definition))
        )
        for name, definition in stages.items()
    }
    return {name: dag[name] for name in _order(file, dag)}


def downstream(dag: Dag, name: str) -> list[str]:
    """All stages that wait for this one, directly or through others, in the order of `dag`."""
    found = {name}
    for other, upstream in dag.items():
        if found & set(upstream):
            found.add(other)
    return [other for other in dag if other in found and other != name]


def _order(file: Path, dag: Dag) -> list[str]:
    sorter = graphlib.TopologicalSorter(dag)
    try:
        sorter.prepare()
    except graphlib.CycleError as problem:
        raise Refusal(f"{file}: these stages wait for each other: {' -> '.join(problem.args[1])}") from None
    position = {name: index for index, name in enumerate(dag)}
    ready: set[str] = set(sorter.get_ready())
    order: list[str] = []
    while ready:
        order.append(min(ready, key=position.__getitem__))
        ready.remove(order[-1])
        sorter.done(order[-1])
        ready.update(sorter.get_ready())
    return order


def _untranslatable(name: str, definition: Any) -> Iterator[str]:
    if not isinstance(definition, Mapping):
        yield f"stage {name}: should be a mapping with a cmd, not {definition!r}"
        return
    for key in definition:
        if key not in TRANSLATED:
            yield f"stage {name}: `{key}`; write the stage out without it"
    if not definition.get("cmd") and "foreach" not in definition:  # the cmd of a foreach stage stands below `do`
        yield f"stage {name}: no `cmd`"
    if "${" in str(definition):
        yield f"stage {name}: templating (`${{...}}`); write the value out"


def _paths(definition: Mapping[str, Any], *kinds: str) -> Iterator[PurePosixPath]:
    """The paths under these keys; an entry is a path or a mapping from paths to their options."""
    for kind in kinds:
        for entry in definition.get(kind) or ():
            for path in entry if isinstance(entry, Mapping) else (entry,):
                yield PurePosixPath(path)


def _dependencies(definition: Mapping[str, Any]) -> Iterator[PurePosixPath]:
    yield from _paths(definition, "deps")
    # A plain entry of `params` is a key of params.yaml; a mapping names another file, which a stage may write.
    files = [entry for entry in definition.get("params") or () if isinstance(entry, Mapping)]
    yield from _paths({"files": files}, "files")


def _overlap(one: PurePosixPath, other: PurePosixPath) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
