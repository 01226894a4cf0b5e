"""Parameters of one run that differ from params.yaml: the same classes check them, and Prefect's pages show a form.

A run takes `{"train.learning_rate": 1e-4}` or, which is what the form makes, `{"train": {"learning_rate": 1e-4}}`. The
form is built from the classes of the stages; its help is the comment beside each number in params.yaml.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import stage

FILE = Path("params.yaml")
DOTTED = r"^[a-z_]+(\.[a-z_0-9]+)+$"  # a key such as train.scratch.num_layers
CONFIG = pydantic.ConfigDict(extra="forbid", strict=True, json_schema_extra={"patternProperties": {DOTTED: {}}})

CHANGE = "change"  # on the button that opens a section of the form

Flat = dict[str, Any]  # "train.learning_rate" -> 1e-4


def form() -> type[pydantic.BaseModel]:
    """The class of all parameters, each of which may be left out.

    Raises:
        Refusal: params.yaml or dvc.yaml is not right.
    """
    known = stage.sections()
    sections = {}
    if known:
        stage.load_params()
        text = _round_trip().load(FILE)
        sections = {key: _form_of(stage.params_class(key), key, text[key]) for key in known}
    fields: dict[str, Any] = {key: (section | None, _section(text, key, section)) for key, section in sections.items()}
    return pydantic.create_model(
        "Overrides",
        __config__=CONFIG | {"title": CHANGE},
        __validators__={"nested": pydantic.model_validator(mode="before")(nested)},  # type: ignore[dict-item]
        **fields,
    )


def parsed(texts: Sequence[str]) -> Flat:
    """Overrides from a command line: `train.learning_rate=1e-4`, the value as YAML.

    Raises:
        Refusal: one of them is not like that.
    """
    found: Flat = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise stage.Refusal(f"{text!r} should be KEY=VALUE, such as train.learning_rate=1e-4")
        try:
            found[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as problem:
            raise stage.Refusal(f"{key}: {value!r} is not valid YAML ({stage.reason(problem)})") from None
    return found


def nested(asked: Any) -> Any:
    """Sections in sections from keys with dots; whatever else is left as it is.

    Raises:
        ValueError: a key says twice what to do, or goes through what is no section.
    """
    if not isinstance(asked, Mapping):
        return asked
    found: dict[str, Any] = {}
    for key, value in asked.items():
        *path, last = str(key).split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {part} is no section")
        if isinstance(value, Mapping):
            value = nested(value)
            if isinstance(inner.get(last), dict):
                value = inner[last] | value
        elif last in inner:
            raise ValueError(f"{key} is there twice")
        inner[last] = value
    return found


def flat(overrides: pydantic.BaseModel | Mapping[str, Any]) -> Flat:
    """Keys with dots of all that is set.

    Raises:
        Refusal: a key says twice what to do, or goes through what is no section.
    """
    given = overrides.model_dump() if isinstance(overrides, pydantic.BaseModel) else overrides
    try:
        return dict(_leaves(nested(_filled_in(given)), ""))
    except ValueError as problem:
        raise stage.Refusal(f"overrides: {problem}") from None


def applied(overrides: Flat) -> str:
    """The text of params.yaml with these values, its comments kept.

    Raises:
        Refusal: with one line for every fault: an unknown key, a wrong type, a value that no stage takes.
    """
    stage.load_params()
    text, yaml = _round_trip().load(FILE), _round_trip()
    unknown = []
    for key, value in overrides.items():
        *path, last = key.split(".")
        inner: Any = text
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            unknown.append(f"  {key}: unknown; params.yaml has no such key")
        else:
            inner[last] = value
    if unknown:
        raise stage.Refusal("overrides that cannot be applied, nothing was run:\n" + "\n".join(unknown))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        yaml.dump(text, file)
        try:
            stage.load_params(file)
        except stage.Refusal as problem:
            raise stage.Refusal(str(problem).replace(str(file), "params.yaml with the overrides")) from None
        return file.read_text(encoding="utf-8")


def _filled_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields of the form that were left empty; where a key has dots, a person wrote the null."""
    return {
        key: _filled_in(value) if isinstance(value, Mapping) else value
        for key, value in given.items()
        if value is not None or "." in key
    }


def _leaves(given: Mapping[str, Any], before: str) -> Any:
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _form_of(described: type[pydantic.BaseModel], name: str, text: Any) -> type[pydantic.BaseModel]:
    """A class like the one of a section, in which every key may be left out."""
    fields: dict[str, Any] = {}
    for key, field in described.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            kind = _form_of(kind, f"{name}.{key}", text[key])
            fields[key] = (kind | None, _section(text, f"{name}.{key}", kind))
            continue
        kind = Annotated[kind, *field.metadata] if field.metadata else kind
        about = f"{_comment(text, key)} Now {_shown(text[key])}.".strip()
        fields[key] = (
            kind | None,
            pydantic.Field(default=None, title=f"{name}.{key}", description=about, json_schema_extra=_without_null),
        )
    return pydantic.create_model(name, __config__=CONFIG | {"title": CHANGE}, **fields)


def _section(text: Any, name: str, section: type[pydantic.BaseModel]) -> Any:
    """A section is closed on the page until someone opens it: the page shows every alternative as a button."""
    about = f"{_comment(text, name.rpartition('.')[2])} {', '.join(section.model_fields)}".strip()
    return pydantic.Field(default=None, title=name, description=about)


def _without_null(schema: dict[str, Any]) -> None:
    """A plain field that may be left empty, where the page would ask for its type, or None, first."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.pop("default", None)  # with one, the server takes no null, which is what an emptied field sends
        schema.update(kinds[0])


def _shown(value: Any) -> str:
    """A value as params.yaml has it."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    return str(value)


def _comment(text: Any, key: str) -> str:
    """What params.yaml says of a key: the lines above it, what is beside it, and lines below that go on with that."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    at, column = text.lc.key(key)

    def indent(number: int) -> int:
        """Of a line that is all comment; -1 of others."""
        line = lines[number] if 0 <= number < len(lines) else ""
        return len(line) - len(line.lstrip()) if line.lstrip().startswith("#") else -1

    first, last = at, at + 1
    while indent(first - 1) == column:
        first -= 1
    while indent(last) > column and not isinstance(text[key], dict):  # of a section: they are about its first key
        last += 1
    above, beside = (" ".join(line.partition("# ")[2] for line in part) for part in (lines[first:at], lines[at:last]))
    return " ".join(_sentence(said) for said in (above, beside) if said.strip())


def _sentence(said: str) -> str:
    """With a capital, but not where it begins with a value that a key may have."""
    said = said.strip().rstrip(".")
    return (
        f"{said[0].upper() if re.match('[a-z]+ [a-z(]', said) else said[0]}{said[1:]}{'' if said[-1] == '?' else '.'}"
    )


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width = 10_000
    yaml.preserve_quotes = True
    return yaml
