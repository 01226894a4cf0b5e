"""What a replay came to: every file beside the recorded one, the losses, the environments, and one of three outcomes.

- byte-identical: every file has the recorded bytes.
- within tolerance: some have not, but the test losses differ by `publish.gate.max_loss_difference` at most; the
  certificate lists what differs between the environments, as far as that is recorded.
- not reproduced: all else. It names the first file that differs, in the order in which the pipeline writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import files, inputs, markdown, recorded, resume

ROOT = Path("certificates")  # for git: evidence is to be committed
IDENTICAL, WITHIN, NOT_REPRODUCED = "byte-identical", "within tolerance", "not reproduced"
LOSSES = ("test_loss", "validation_loss")  # as metrics of the MLflow run are called
NUM_DIGITS = 8  # of a publication, in the name of its certificate


@dataclass(frozen=True)
class File:
    """A file's digest as it was recorded, and as it is after the replay; None: not there."""

    path: str
    recorded: str | None
    replayed: str | None

    @property
    def agrees(self) -> bool:
        """Whether the bytes are the recorded ones."""
        return self.recorded == self.replayed


def compare(recorded_md5: Mapping[str, str], folder: Path, outputs: Iterable[str]) -> list[File]:
    """Every recorded file beside that of the folder, in the order given, and then what only the folder holds.

    Args:
        recorded_md5: path -> MD5, in the order in which they are written; of a folder too, if its files are not known.
        folder: where the pipeline ran again.
        outputs: the files and folders that it wrote there.
    """
    there = {
        file.relative_to(folder).as_posix(): None
        for output in outputs
        if output not in recorded_md5
        for file in sorted(recorded.files_under(folder / output))
    }
    return [
        File(path, recorded_md5.get(path), inputs.md5_of(folder / path) if (folder / path).exists() else None)
        for path in dict.fromkeys([*recorded_md5, *there])
    ]


def losses(then: Mapping[str, float], now: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """The losses of the final model, recorded and replayed, and their difference; None where one is not finite."""
    return {
        name: {
            "recorded": then.get(name),
            "replayed": now.get(name),
            "difference": now[name] - then[name] if name in then and name in now else None,
        }
        for name in LOSSES
    }


def judge(compared: Sequence[File], difference: float | None, tolerance: float) -> tuple[str, str]:
    """The outcome, and why.

    Args:
        compared: all files, in the order in which they are written.
        difference: of the test losses, in nats per token.
        tolerance: the difference that rounding may make.
    """
    others = [file for file in compared if not file.agrees]
    if not others:
        return IDENTICAL, f"all {len(compared)} files have the bytes that were recorded"
    first = f"{others[0].path} is the first of {len(others)} files that differ (of {len(compared)})"
    if difference is None:
        return NOT_REPRODUCED, f"{first}, and there are no two test losses to compare"
    losses_differ = f"the test losses differ by {abs(difference):.2g} nats a token ({tolerance:g} is allowed)"
    if abs(difference) <= tolerance:
        return WITHIN, f"{losses_differ}; {first}"
    return NOT_REPRODUCED, f"{first}, and {losses_differ}"


def environment(training: Path | None, locked: Path) -> dict[str, Any]:
    """What is recorded of an environment: the numeric class in a model's training.json, the MD5 of the locked set."""
    about = files.read_json(training) if training else {}
    return {
        "numeric_class": about.get("numeric_class", {}),
        "requirements.lock": inputs.md5_of(locked) if locked.exists() else None,
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any], locked_then: str) -> list[str]:
    """What differs between two environments, a line each; packages are those installed here."""
    group = "numeric class"
    lines = resume.differences({group: then["numeric_class"]}, {group: now["numeric_class"]})
    if then["requirements.lock"] != now["requirements.lock"]:
        lines.append("requirements.lock: changed")
    return lines + list(_other_packages(locked_then))


def _other_packages(locked: str) -> Iterator[str]:
    for line in locked.splitlines():
        name, equals, pinned = line.partition("==")
        if equals and not line.startswith("#") and (installed := _installed(name)) != pinned.partition("+")[0]:
            yield f"package {name}: was {pinned}, is {installed}"


def _installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "not there"


def write(content: Mapping[str, Any]) -> Path:
    """Write the certificate for machines and for people; return the latter."""
    name = content["publication"][:NUM_DIGITS]
    files.write_json(ROOT / f"{name}.json", content)
    files.write_text(ROOT / f"{name}.md", text(content))
    return ROOT / f"{name}.md"


def text(content: Mapping[str, Any]) -> str:
    """The certificate as Markdown."""
    then, now, others = (content["environment"][key] for key in ("then", "now", "differences"))
    about = {
        "result": content["publication"],
        "models": ", ".join(content["versions"]) or "none registered",
        "MLflow run": content["run"],
        "commit": content["commit"],
        "asked for as": content["asked"],
        "replayed": content["date"],
    }
    return "\n".join(
        [
            f"# Replay of {content['publication'][:NUM_DIGITS]}: {content['outcome']}",
            "",
            f"**{content['outcome']}**: {content['why']}.",
            "",
            *markdown.table(["", ""], about.items()),
            "",
            "## Losses, in nats per token",
            "",
            *markdown.table(
                ["", "recorded", "replayed", "difference"],
                ([name, *map(_number, one.values())] for name, one in content["losses"].items()),
            ),
            "",
            "## Environment",
            "",
            *(f"- {line}" for line in others or ["Nothing that is recorded differs."]),
            "",
            *markdown.table(["", "recorded", "replayed"], ([key, then[key], now[key]] for key in now)),
            "",
            "## Files",
            "",
            *markdown.table(
                ["file", "recorded", "replayed"],
                ([one[key] or "not there" for key in ("path", "recorded", "replayed")] for one in content["files"]),
            ),
            "",
        ]
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
