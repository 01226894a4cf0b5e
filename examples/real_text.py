"""Real English that every Python brings along: its own reference manual, a paragraph a line.

    python -m examples.real_text

Writes data/source/python-reference.txt for `ingest.source: files`. The text is left as it is found, headings, grammar
and code among the prose and the same paragraph under several topics: `clean` should have something to do.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline import files

FILE = Path("data/source/python-reference.txt")
UNDERLINE = re.compile(r"^[*=\-^~]{3,}$", re.MULTILINE)  # what marks the line above as a heading


def paragraphs() -> list[str]:
    """The paragraphs in the order of their topics' names, each on one line."""
    from pydoc_data.topics import topics

    found = [
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in re.split(r"\n\s*\n", UNDERLINE.sub("", topics[name]))
    ]
    return [paragraph for paragraph in found if paragraph]


def write(file: Path, num_paragraphs: int | None = None) -> int:
    """Write the first paragraphs, or all; return how many."""
    lines = paragraphs()[:num_paragraphs]
    files.write_text(file, "".join(f"{line}\n" for line in lines))
    return len(lines)


if __name__ == "__main__":
    print(f"{FILE}: {write(FILE)} paragraphs")
