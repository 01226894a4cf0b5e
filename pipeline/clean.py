"""Clean: raw documents become normalised, filtered, distinct ones, and every drop is counted by reason.

In:  data/raw/documents.parquet (text)
Out: data/clean/documents.parquet (text, sha256 of its UTF-8 bytes), reports/clean.json

    python -m pipeline.clean

The first of several equal or nearly equal documents is kept, so no two documents that leave this stage are
near-duplicates of each other (pipeline/near_duplicates.py says what that means), and none can lie in the
training text while its twin lies in the test text.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pydantic
from tqdm import tqdm

from pipeline import documents, files, stage
from pipeline.near_duplicates import NearDuplicates

# Why a document is dropped. `normalised` is no drop: the bytes that normalisation took from kept documents
# (a negative number where NFKC spelled characters out in more bytes).
REASONS = ("empty", "too_short", "too_long", "broken", "exact_duplicate", "near_duplicate")
NORMALISED = "normalised"

# Characters that say nothing: C0 and C1 controls, DEL, soft hyphen, zero-width space, word joiner, BOM, marks of
# interlinear annotation, noncharacters. They would only cut words into rare tokens. The invisible characters
# that do say something stay: the zero-width joiner and non-joiner (emoji, Indic scripts, Persian), the marks of
# direction, variation selectors, tags (flags).
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17))
_INVISIBLE = re.compile(
    f"[\\x00-\\x08\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb{_NONCHARACTERS}]"
)
_NEWLINE = re.compile("\r\n|[\r\v\f\u0085\u2028\u2029]")
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_GAP = re.compile(r"(?<=[^ \t])[ \t]+")
_BLANK_LINES = re.compile(r"\n{3,}")
REPLACEMENT = "\ufffd"  # what ingest puts in place of bytes that are not UTF-8
MARKS = 1000  # combining marks in a row: no script stacks so many, and putting them in order takes quadratic time


class Params(stage.Params):
    """Section `clean` of params.yaml."""

    unicode_form: Literal["NFC", "NFKC", "none"]
    min_characters: int = pydantic.Field(ge=1)
    max_characters: int = pydantic.Field(ge=1)
    max_broken_share: float = pydantic.Field(ge=0, le=1)
    # Below one half, the bands of the search would be so thin that everything is compared with everything.
    near_duplicate_similarity: float = pydantic.Field(ge=0.5, le=1)
    minhash_permutations: int = pydantic.Field(ge=16, le=1024)
    min_documents: int = pydantic.Field(ge=0)

    @pydantic.model_validator(mode="after")
    def _lengths_leave_room(self) -> Params:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is above max_characters {self.max_characters}: "
                "every document would be dropped"
            )
        return self


@dataclass
class Tally:
    """What came in and where it went: bytes_in = bytes_kept + the sum of bytes_dropped, always."""

    documents_in: int = 0
    documents_kept: int = 0
    documents_dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    bytes_in: int = 0
    bytes_kept: int = 0
    bytes_dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*REASONS, NORMALISED), 0))

    def drop(self, raw: str, reason: str) -> None:
        """Count a document that goes."""
        num_bytes = len(raw.encode())
        self.documents_in += 1
        self.bytes_in += num_bytes
        self.documents_dropped[reason] += 1
        self.bytes_dropped[reason] += num_bytes

    def keep(self, raw: str, text: str) -> None:
        """Count a document that stays, as `text`."""
        num_bytes_raw, num_bytes = len(raw.encode()), len(text.encode())
        self.documents_in += 1
        self.bytes_in += num_bytes_raw
        self.documents_kept += 1
        self.bytes_kept += num_bytes
        self.bytes_dropped[NORMALISED] += num_bytes_raw - num_bytes

    @property
    def drops(self) -> str:
        """Every reason that occurred, with its count, as words."""
        return ", ".join(f"{reason} {count:,}" for reason, count in self.documents_dropped.items() if count)


def normalise(text: str, unicode_form: Literal["NFC", "NFKC", "none"]) -> str:
    """One spelling for what reads the same. Normalising twice is normalising once.

    Invisible characters go; every kind of line end becomes one newline and every kind of space a plain one;
    gaps inside a line shrink to one space, more than one blank line to one, and the ends are trimmed.
    Indentation stays: in code and verse it means something.
    """
    text = _INVISIBLE.sub("", text)
    if unicode_form != "none":
        text = unicodedata.normalize(unicode_form, text)
    text = _SPACE.sub(" ", _NEWLINE.sub("\n", text))
    lines = (_GAP.sub(" ", line).rstrip(" \t") for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip(" \t\n")


@functools.cache
def _pile_of_marks() -> re.Pattern[str]:
    """Marks in a row, those among them that are characters of another kind until they are decomposed (U+FF9E)."""
    marks = "".join(
        character
        for character in map(chr, range(0x110000))
        if all(map(unicodedata.combining, unicodedata.normalize("NFKD", character)))
    )
    return re.compile(f"[{marks}]{{{MARKS}}}")


def examined(raw: str, params: Params) -> tuple[str, str | None]:
    """The normalised text of a document, and why it is no good by itself, or None."""
    # Without the invisible characters, as normalising leaves them out before it puts marks in order.
    if len(raw) >= MARKS and not raw.isascii() and _pile_of_marks().search(_INVISIBLE.sub("", raw)):
        return "", "broken"
    text = normalise(raw, params.unicode_form)
    return text, fault(text, params)


def fault(text: str, params: Params) -> str | None:
    """Why a normalised text is no good by itself, or None."""
    if not text:
        return "empty"
    if len(text) < params.min_characters:
        return "too_short"
    if len(text) > params.max_characters:
        return "too_long"
    if text.count(REPLACEMENT) > params.max_broken_share * len(text):
        return "broken"
    return None


def cleaned(batches: Iterable[list[str]], params: Params, tally: Tally) -> Iterator[tuple[str, str]]:
    """Yield (text, sha256) of what is kept, in order, counting everything in `tally`.

    Memory is one batch, and about 1 kB for every document kept.
    """
    seen: set[bytes] = set()
    kinds = NearDuplicates(params.near_duplicate_similarity, params.minhash_permutations)
    for batch in batches:
        candidates: list[tuple[str, str, str]] = []
        for raw in batch:
            text, reason = examined(raw, params)
            digest = hashlib.sha256(text.encode())
            if reason is None and digest.digest() in seen:
                reason = "exact_duplicate"
            if reason is None:
                seen.add(digest.digest())
                candidates.append((raw, text, digest.hexdigest()))
            else:
                tally.drop(raw, reason)
        first = kinds.first_of_their_kind([text for _, text, _ in candidates])
        for is_first, (raw, text, sha256) in zip(first, candidates, strict=True):
            if is_first:
                tally.keep(raw, text)
                yield text, sha256
            else:
                tally.drop(raw, "near_duplicate")


def nothing_left(tally: Tally) -> str:
    """What to tell a user of whose documents none survived."""
    if not tally.documents_in:
        return "data/raw holds no document: put text into data/source, or set ingest.source: demo"
    return (
        f"none of {tally.documents_in:,} documents is left ({tally.drops}). too_short and too_long are set by "
        "clean.min_characters and clean.max_characters; broken (clean.max_broken_share) mostly means that the files "
        "are not UTF-8: convert them, for example with `iconv -f latin1 -t utf-8`"
    )


def main(paths: stage.Paths, clean: Params) -> None:
    """Clean data/raw into data/clean, write the counts, and warn if little is left."""
    raw = paths["raw"] / "documents.parquet"
    tally = Tally()
    with files.whole_folder(paths["clean"]) as folder:
        rows = cleaned((texts for (texts,) in documents.read(raw, "text")), clean, tally)
        progress = tqdm(rows, total=documents.count(raw), desc="clean", unit=" documents", disable=None)
        documents.write(folder / "documents.parquet", ("text", "sha256"), progress)
        if not tally.documents_kept:
            raise stage.Refusal(nothing_left(tally))
    files.write_json(paths["clean.json"], vars(tally))
    print(f"clean: kept {tally.documents_kept:,} of {tally.documents_in:,} documents ({tally.drops or 'no drops'})")
    if tally.documents_kept < clean.min_documents:
        print(
            f"clean: warning: {tally.documents_kept:,} documents are left, fewer than clean.min_documents "
            f"({clean.min_documents:,}). A model learns so few by heart instead of learning the language, and "
            "losses on so small a validation and test side are rough. Add text, or fine-tune a pretrained model "
            "(model.base).",
            file=sys.stderr,
        )


if __name__ == "__main__":
    stage.run("clean", main)
