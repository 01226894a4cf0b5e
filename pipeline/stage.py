"""The anatomy that all stages share: parameters in, paths in, one way to fail.

`dvc.yaml` is the only place that names data paths and says which sections of `params.yaml`
a stage reads. A stage's `main` receives exactly those:

    def main(paths: Paths, clean: Params) -> None: ...

    if __name__ == "__main__":
        stage.run("clean", main)

`paths` maps the last component of every data dependency and output to its path
(`paths["raw"]`, `paths["clean.json"]`); every section arrives as the keyword of its name.
"""

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent

Paths = Mapping[str, Path]

NUM_FAULTS_SHOWN = 20
MAX_YAML_BYTES = 2**18  # of a file, and of what it is once every alias stands for a copy; ours has seven thousand
MAX_YAML_DEPTH = 100


class Refusal(ValueError):
    """What a user can cause and mend: shown as one message, without a traceback."""


class Interrupted(Exception):
    """A signal asked a stage to stop, and it stopped in good order; holds the signal's number and what to tell."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Params(pydantic.BaseModel):
    """A section of params.yaml: every key required, none unknown, no value coerced, frozen."""

    model_config = pydantic.ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=False
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _fits_64_bits(cls, value: object) -> object:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("should have at most 18 digits")
        return value


def run(name: str, main: Callable[..., None]) -> None:
    """Run one stage: check params.yaml, resolve the paths, call `main` alone in the checkout, translate failures.

    Exit codes: 0 done, 1 refused (one message on stderr), 128 + signal interrupted. A traceback
    means that the fault is ours.
    """
    from pipeline import launcher

    launcher.settle()
    module = sys.modules["__main__"]
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}",
        description=module.__doc__,
        epilog="Parameters come from params.yaml, paths from dvc.yaml; `dvc repro` runs what is stale.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    from pipeline import inputs, owner  # they refuse, with the class above

    with refusals(name):
        stages = read_stages()
        if name not in stages:
            raise Refusal(f"dvc.yaml has no stage {name}; it has {', '.join(stages)}")
        definition = stages[name]
        sections = load_params()
        wanted = {key.split(".")[0] for key in definition.get("params", [])}
        with owner.alone(name):
            inputs.check(name)
            main(paths_of(definition), **{key: sections[key] for key in sorted(wanted)})


@contextlib.contextmanager
def refusals(name: str) -> Any:
    """Turn what a user can cause into one message and an exit code; leave our mistakes alone."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no failure
    try:
        yield
    except (Refusal, OSError) as problem:
        fail(f"{name}: {problem}")
    except Interrupted as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def refused_as(refusal: Callable[[BaseException], Refusal]) -> Iterator[None]:
    """Refuse, in the words of `refusal`, whatever a damaged or hostile byte makes a library raise.

    That can be anything, and where the library is written in Rust, a panic, which is no Exception.
    """
    try:
        yield
    except (Refusal, Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:
        raise refusal(problem) from None


def fail(message: str) -> NoReturn:
    """End the process with one message and exit code 1."""
    print("\n".join(map(plain, message.split("\n"))), file=sys.stderr)
    sys.exit(1)


def plain(line: str) -> str:
    """A line, perhaps with a name in it that somebody else chose, that no terminal takes for a command."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def reason(problem: object) -> str:
    """What an exception of somebody else's says, as part of a sentence: one short line."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return plain(lines[0][:200]).rstrip(".:")


def read_stages(file: Path = Path("dvc.yaml")) -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml, by name, in the order they are written."""
    if not file.exists():
        raise Refusal(f"no {file} in {Path.cwd()}: run this from the root of the repository")
    stages = _read_yaml(file).get("stages")
    if not stages or not isinstance(stages, dict):
        raise Refusal(f"{file} has no stages; restore it with `git checkout {file}`")
    return stages


def paths_of(definition: Mapping[str, Any]) -> dict[str, Path]:
    """The data paths of one stage, by their last component; code and lock files are not data."""
    paths: dict[str, Path] = {}
    for kind in ("deps", "outs", "metrics", "plots"):
        for entry in definition.get(kind, []):
            path = Path(next(iter(entry)) if isinstance(entry, Mapping) else entry)
            if path.suffix in {".py", ".lock"}:
                continue
            assert path.name not in paths, f"two paths of one stage are called {path.name}"
            paths[path.name] = path
    return paths


def dependencies_of(name: str) -> list[Path]:
    """Everything that dvc.yaml says the stage depends on, code included."""
    return [Path(entry) for entry in read_stages()[name]["deps"]]


def load_params(file: Path = Path("params.yaml")) -> dict[str, Any]:
    """Check the whole of params.yaml and return its sections as frozen objects.

    Every stage checks every section, so a mistake in `train` stops `ingest` before any work.
    Section `x` is described by the class `Params` of module `pipeline.x`. Those modules are
    looked up by name and are no dependency of the stage: they can refuse, never change a result.
    Values of a section are held against each other once each of them is right by itself.

    Raises:
        Refusal: with one line for every fault found.
    """
    if not file.exists():
        raise Refusal(f"no {file} in {Path.cwd()}: restore it with `git checkout {file}`")
    raw = _read_yaml(file)
    known = sections()
    faults = [f"{key}: missing section" for key in known if key not in raw]
    faults += [f"{_name(key)}: unknown section; known: {', '.join(known)}" for key in raw if key not in known]
    checked: dict[str, Any] = {}
    for key in known:
        if key in raw:
            try:
                checked[key] = params_class(key).model_validate(raw[key])
            except pydantic.ValidationError as problem:
                faults += [_fault(key, error) for error in problem.errors()]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        rest = ["..."] if len(faults) > NUM_FAULTS_SHOWN else []
        listing = "\n".join(f"  {fault}" for fault in faults[:NUM_FAULTS_SHOWN] + rest)
        raise Refusal(f"{file} has {count}, nothing was run:\n{listing}")
    return checked


def sections() -> list[str]:
    """The sections that params.yaml must have: all that a stage of dvc.yaml reads."""
    named = (key for definition in read_stages().values() for key in definition.get("params", []))
    return list(dict.fromkeys(key.split(".")[0] for key in named))


def params_class(section: str) -> type[Params]:
    """The class that describes a section: `Params` of the module of that name."""
    found: type[Params] = importlib.import_module(f"pipeline.{section}").Params
    return found


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file() or file.stat().st_size > MAX_YAML_BYTES:  # a pipe or /dev/zero would never end
        raise Refusal(f"{file} is no file of at most {MAX_YAML_BYTES:,} bytes; restore it with `git checkout {file}`")
    try:
        text = file.read_text(encoding="utf-8")
        _refuse_expansion(text)
        # YAML 1.2, as DVC reads it: 3e-4 is a number and `no` is a word.
        content = YAML(typ="safe", pure=True).load(text)
    except OSError:
        raise
    except Exception as problem:  # of a hundred kinds: bytes that are no UTF-8, an impossible date, `!!bool x`, ...
        raise Refusal(f"{file} is not valid YAML: {_yaml_reason(problem)}") from None
    if content is None:
        raise Refusal(f"{file} is empty; restore it with `git checkout {file}`")
    if not isinstance(content, dict):
        raise Refusal(f"{file} should hold sections (`name:` and indented keys), not only {_shown(content)}")
    return content


def _refuse_expansion(text: str) -> None:
    """Refuse aliases that stand for much more than the file holds: `<<` and messages would write all of it out.

    Raises:
        ValueError: too much, too deep, or an alias inside what it names.
    """
    sizes: dict[str, int] = {}  # of every anchor's node, its aliases written out
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, and size before the node
    size = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                raise ValueError(f"*{event.anchor} is inside what it names")
            size += sizes.get(event.anchor, 0)
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes |= {anchor: size - before} if anchor else {}
        elif isinstance(event, NodeEvent):
            before, size = size, size + 1 + (len(event.value) if isinstance(event, ScalarEvent) else 0)
            if isinstance(event, CollectionStartEvent):
                open_nodes.append((event.anchor, before))
                if len(open_nodes) > MAX_YAML_DEPTH:
                    raise ValueError("it is nested too deeply")
            elif event.anchor:
                sizes[event.anchor] = size - before
        if size > MAX_YAML_BYTES:
            raise ValueError("its aliases (*name) stand for too much")


def _yaml_reason(problem: Exception) -> str:
    """What is wrong with the YAML, and where."""
    if not isinstance(problem, MarkedYAMLError):
        return reason(problem)
    mark = problem.problem_mark or problem.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + reason(problem.problem or problem.context)


def _fault(section: str, error: Any) -> str:
    """One line for one fault: the key, the value, what would be right."""
    key = ".".join([section, *(_name(part) for part in error["loc"])])
    value = _shown(error["input"])
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key (value {value}); remove it or mend its name"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{key}: {message}"
    if error["type"] == "model_type":
        return f"{key}: should hold keys, indented below it; got {value}"
    if error["type"] == "string_type" and not isinstance(error["input"], list | dict | None):
        return f"{key}: should be text; got {value}: put it in quotes"
    return f"{key}: {message}; got {value}"


def _shown(value: object) -> str:
    """A value as part of a sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(key: object) -> str:
    """A key as part of a sentence: as it is written, unless that would spoil the line."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 80 else _shown(key)
