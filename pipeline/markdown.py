"""Markdown in which text is shown as it is: nothing that a model or a file says becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def escaped(line: str) -> str:
    """A line that Markdown shows as it is, with no more escapes than that takes; control characters show.

    MLflow's pages know a backslash before some marks alone; the others are written as HTML writes them.
    """
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", line.replace("\t", " "))
    line = re.sub(r"[\\`*_\[\]>|~#]|^[-+=]|(?<=www)\.", r"\\\g<0>", line)  # marks, links
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)  # no numbered list
    return re.sub(r"[<&$@]|:(?=//|[\w+-]+:)", lambda mark: f"&#{ord(mark[0])};", line)  # tags, mentions, emoji


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table, a line a row; cells may be escaped already."""
    lines = [head, ["---"] * len(head), *([re.sub(r"(?<!\\)\|", r"\|", str(cell)) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
