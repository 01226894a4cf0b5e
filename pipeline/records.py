"""Records become documents, and every byte is counted once.

A record is what can become one document: a line, a row, a whole file. It is kept, or dropped under one reason, so
`bytes_in = bytes_kept + sum(bytes_dropped)` holds exactly. For .txt, .jsonl and .csv these are the bytes of the file
(after decompression), line ends, quotes and JSON syntax included; for parquet, the Hub and the demo corpus they are the
bytes of the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.stage import Refusal, plain

if TYPE_CHECKING:
    from pipeline.ingest import Params

NUM_NAMES_SHOWN = 20  # in the report and in messages
NUM_CHARACTERS_SHOWN = 80  # of each
REASONS = {
    "bad_csv": "a CSV row with more or fewer columns than the header, or with text after a closing quote",
    "bad_json": "a line that is not JSON",
    "blank": "nothing but whitespace",
    "invalid_utf8": "bytes that are not UTF-8, where ingest.invalid_utf8 is drop",
    "no_text": "no text in the column or under the key ingest.text_column",
    "too_long": "more bytes than ingest.max_document_bytes",
}
SEPARATORS = "\x85\u2028\u2029"
FORMAT = "format"  # bytes of no record: byte order marks and CSV header rows
UNUSABLE = ("bad_csv", "bad_json", "no_text")  # a file of nothing else is refused
NOTICED = {
    "byte_order_mark_removed": "files",
    "carriage_return_to_newline": "documents with CR or CRLF inside",
    "invalid_utf8_replaced": "documents in which U+FFFD stands for what is not UTF-8",
    "nul_kept": "documents; the clean stage removes control characters",
    "unicode_line_separator_kept": "documents with NEL, U+2028 or U+2029, which end no line here",
}


class Record(NamedTuple):
    """What can become one document."""

    number: int  # of its first line or of its row, from 1
    size: int  # bytes it takes, line end and syntax included
    content: bytes
    dropped: str = ""  # a reason that the reader already knows


class Dropped(Exception):
    """Why a record becomes no document: reason, and detail for the message if the whole file is like that."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail or REASONS[reason]


@dataclass
class Tally:
    """What came in and what became of it."""

    files_read: int = 0
    files_skipped: dict[str, list[str]] = field(default_factory=dict)
    documents_in: int = 0
    documents_kept: int = 0
    documents_dropped: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    bytes_in: int = 0  # counted where bytes are read, apart from what becomes of them
    bytes_kept: int = 0
    bytes_dropped: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys((*REASONS, FORMAT), 0)))
    bytes_out: int = 0  # UTF-8 bytes of the documents
    first_dropped: dict[str, str] = field(default_factory=dict)
    noticed: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(NOTICED, 0)))

    def skip_file(self, name: str, reason: str) -> None:
        self.files_skipped.setdefault(reason, []).append(name)

    def drop(self, reason: str, name: str, record: Record) -> None:
        self.documents_dropped[reason] += 1
        self.bytes_dropped[reason] += record.size
        if reason not in self.first_dropped:
            self.first_dropped[reason] = f"{name}:{record.number}"

    def keep(self, text: str, num_bytes: int) -> None:
        self.documents_kept += 1
        self.bytes_kept += num_bytes
        self.bytes_out += len(text.encode())
        self.noticed["nul_kept"] += "\0" in text
        self.noticed["unicode_line_separator_kept"] += not text.isascii() and any(m in text for m in SEPARATORS)

    def report(self) -> dict[str, Any]:
        """What reports/ingest.json holds."""
        assert self.bytes_in == self.bytes_kept + self.bytes_dropped.total(), "bytes lost or counted twice"
        assert self.documents_in == self.documents_kept + self.documents_dropped.total()
        return {
            "files_read": self.files_read,
            "files_skipped": {reason: len(names) for reason, names in self.files_skipped.items()},
            "files_skipped_names": {reason: names[:NUM_NAMES_SHOWN] for reason, names in self.files_skipped.items()},
            "documents_in": self.documents_in,
            "documents_kept": self.documents_kept,
            "documents_dropped": dict(self.documents_dropped),
            "bytes_in": self.bytes_in,
            "bytes_kept": self.bytes_kept,
            "bytes_dropped": dict(self.bytes_dropped),
            "bytes_out": self.bytes_out,
            "first_dropped": self.first_dropped,
            "noticed": dict(self.noticed),
        }


def documents(
    records: Iterable[Record], text_of: Callable[[str], str], name: str, ingest: Params, tally: Tally
) -> Iterator[str]:
    """The documents among the records of one file; the others are counted under their reason.

    Raises:
        Refusal: bytes that are not UTF-8, where that is the policy; or no record is usable.
    """
    num_unusable = num_others = 0
    first_fault = ""
    for record in records:
        tally.documents_in += 1
        if not record.dropped and (not record.content or record.content.isspace()):  # quickly: there can be millions
            tally.drop("blank", name, record)
            continue
        place = f"{name}:{record.number}"
        try:
            text = _text(record, text_of, ingest.invalid_utf8, tally)
        except Dropped as why:
            if why.reason == "invalid_utf8" and ingest.invalid_utf8 == "refuse":
                raise Refusal(
                    f"{place}: {why.detail}; convert it to UTF-8, or set ingest.invalid_utf8 to replace or drop"
                ) from None
            tally.drop(why.reason, name, record)
            num_unusable += why.reason in UNUSABLE
            num_others += why.reason not in (*UNUSABLE, "blank")
            if why.reason in UNUSABLE:
                first_fault = first_fault or f"{place}: {why.detail}"
        else:
            num_others += 1
            tally.keep(text, record.size)
            yield text
    if num_unusable and not num_others:
        raise Refusal(f"{name}: no usable record among {num_unusable}. {first_fault}. Mend the file or move it away")


def _text(record: Record, text_of: Callable[[str], str], policy: str, tally: Tally) -> str:
    """The text of one record, its line ends made LF.

    Raises:
        Dropped: it has none, or not one that the policy lets through.
    """
    if record.dropped:
        raise Dropped(record.dropped)
    line, replaced = _decoded(record.content, "utf-8", policy)
    if line.isspace():  # of the Unicode kind
        raise Dropped("blank")
    text = text_of(line)
    if not text or text.isspace():
        raise Dropped("blank")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        text, replaced = _decoded(text.encode("utf-16-le", "surrogatepass"), "utf-16-le", policy)
    tally.noticed["invalid_utf8_replaced"] += replaced
    if "\r" in text:
        tally.noticed["carriage_return_to_newline"] += 1
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def _decoded(content: bytes, encoding: str, policy: str) -> tuple[str, bool]:
    """The text, and whether something had to be replaced."""
    try:
        return content.decode(encoding), False
    except UnicodeDecodeError as fault:
        if policy != "replace":
            byte = content[fault.start]
            raise Dropped("invalid_utf8", f"byte {fault.start + 1} of the record (0x{byte:02X}) is not UTF-8") from None
        return content.decode(encoding, "replace"), True


def listed(names: Iterable[str]) -> str:
    """The first names, separated by commas, each as it is unless that would spoil a line or a terminal."""
    found = list(names)
    shown = [plain(name[:NUM_CHARACTERS_SHOWN]) for name in found[:NUM_NAMES_SHOWN]]
    return ", ".join(shown) + (", ..." if len(found) > NUM_NAMES_SHOWN else "")
