"""Files of any supported kind become records, in bounded memory.

Whatever the size of a file or of a line in it, a reader holds at most one record of `max_document_bytes` and one chunk
(of parquet: one page); of a longer record only the size is counted.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import json
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from pipeline import parquet
from pipeline.records import FORMAT, Dropped, Record, Tally, documents, listed
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from pipeline.ingest import Params

KINDS = ("txt", "jsonl", "csv", "parquet")
README = "README.md"  # explains the folder; no data
CHUNK_BYTES = 2**18
# Where records end. U+2028, U+2029, NEL, vertical tab and form feed are characters of a text and end nothing.
LINE = re.compile(rb"\r\n|\r|\n")
CSV_ROW = re.compile(rb"\r\n|\r|\n|,|\"")
WHOLE_FILE = re.compile(rb"(?!)")
CSV_FIELD = re.compile(r'(?:"((?:[^"]|"")*+)"|((?!")[^,]*+))(,|\Z)')


def find_files(folder: Path, tally: Tally) -> list[Path]:
    """The files under `folder` that hold documents, sorted by the bytes of their relative path.

    Skipped and counted: hidden files, linked folders (DVC does not look into them), links to themselves, pipes,
    sockets and devices, unknown extensions, empty files.

    Raises:
        Refusal: something cannot be listed or looked at.
    """
    entries: list[Path] = []
    folders = [folder]
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as listing:
                for entry in listing:
                    inside = entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
                    (folders if inside else entries).append(Path(entry.path))
        except OSError as problem:
            raise Refusal(f"cannot list {here} ({problem.strerror}): chmod u+rx it, or move it away") from None
    found = []
    for path in sorted(entries, key=lambda path: os.fsencode(path.relative_to(folder).as_posix())):
        why = _why_skipped(path)
        if not why:
            found.append(path)
        elif path != folder / README:
            tally.skip_file(name_of(path, folder), why)
    return found


def _why_skipped(path: Path) -> str:
    """The reason that a file is not read; empty if it is."""
    if path.name.startswith("."):
        return "hidden"
    try:
        about = path.stat()
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            return "link_loop"
        raise Refusal(f"cannot read {path} ({problem.strerror}): mend it, or move it away") from None
    if stat.S_ISDIR(about.st_mode):
        return "linked_folder"
    if not stat.S_ISREG(about.st_mode):
        return "special_file"
    if kind_of(path) not in KINDS:
        return "unknown_extension"
    return "" if about.st_size else "empty_file"


def name_of(path: Path, folder: Path) -> str:
    r"""The path relative to the folder, with '/'; bytes of it that are not UTF-8 as \xNN."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def kind_of(path: Path) -> str:
    """The extension that says how to read the file: in lower case, that before `.gz`."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def read_file(path: Path, name: str, ingest: Params, tally: Tally, scratch: Path) -> Iterator[str]:
    """The documents of one file; `scratch` is a folder for what is read from its end and must be unpacked first.

    Raises:
        Refusal: it cannot be read, is damaged, lacks the text column or has no usable record.
    """
    tally.files_read += 1
    try:
        with contextlib.ExitStack() as opened:
            file: IO[bytes] = opened.enter_context(path.open("rb"))
            if path.name.lower().endswith(".gz"):
                file = cast(IO[bytes], opened.enter_context(gzip.open(file)))
                if kind_of(path) == "parquet":
                    unpacked = opened.enter_context(tempfile.TemporaryFile(dir=scratch))
                    shutil.copyfileobj(file, unpacked, CHUNK_BYTES)
                    file = unpacked
            records, text_of = records_of(file, kind_of(path), name, ingest, tally)
            yield from documents(records, text_of, name, ingest, tally)
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise Refusal(f"{path} is damaged or no gzip file ({problem}): fetch it again, or compress it again") from None
    except OSError as problem:
        remedy = f"make room in {scratch}" if problem.errno == errno.ENOSPC else "chmod u+r it"
        raise Refusal(f"cannot read {path} ({problem.strerror or problem}): {remedy}, or move it away") from None


def records_of(
    file: IO[bytes], kind: str, name: str, ingest: Params, tally: Tally
) -> tuple[Iterator[Record], Callable[[str], str]]:
    """The records of an open file, and the function from what a record holds to its text."""
    if kind == "parquet":
        return parquet.records(file, name, ingest, tally), str
    parts = chunks(file, name, tally)
    if kind == "csv":
        rows = split(parts, CSV_ROW, name, ingest.max_document_bytes)
        header = next(rows, None)
        if header is None:
            return rows, str
        tally.bytes_dropped[FORMAT] += header.size
        return rows, csv_column(header, name, ingest.text_column)
    whole = kind == "txt" and ingest.txt_documents == "files"
    records = split(parts, WHOLE_FILE if whole else LINE, name, ingest.max_document_bytes)
    return records, (lambda line: json_text(line, ingest.text_column)) if kind == "jsonl" else str


def chunks(file: IO[bytes], name: str, tally: Tally) -> Iterator[bytes]:
    """The bytes of a file without its byte order mark, no chunk ending between CR and LF."""
    rest = file.read(3)
    tally.bytes_in += len(rest)
    if rest.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Refusal(f"{name} is UTF-16: convert it (iconv -f UTF-16 -t UTF-8 OLD > NEW), or move it away")
    if rest == codecs.BOM_UTF8:
        tally.noticed["byte_order_mark_removed"] += 1
        tally.bytes_dropped[FORMAT] += len(rest)
        rest = b""
    while chunk := file.read(CHUNK_BYTES):
        tally.bytes_in += len(chunk)
        chunk = rest + chunk
        rest = b"\r" if chunk.endswith(b"\r") else b""
        yield chunk[: len(chunk) - len(rest)]
    yield rest


def split(parts: Iterable[bytes], end: re.Pattern[bytes], name: str, max_bytes: int) -> Iterator[Record]:
    """Cut a stream into records; of those above `max_bytes` only the size is kept.

    With `CSV_ROW` a line end inside quotes ends nothing. A quote counts only where a field begins, so that a stray one
    inside a field is harmless, and one that should not begin a field costs the rows up to the next quote.

    Raises:
        Refusal: a quote is never closed.
    """
    held, size = bytearray(), 0  # the record so far: its bytes while they are few enough, and their number
    number = line = 1
    passed = 0  # bytes before this part
    quoted, field_start, closed = False, 0, -1  # the last two are positions in the stream
    for part in parts:
        begin = 0
        for mark in end.finditer(part):
            if mark[0] == b",":
                field_start = passed + mark.end()  # harmless inside quotes
            elif mark[0] == b'"' and quoted:
                quoted, closed = False, passed + mark.end()
            elif mark[0] == b'"':  # at the start of a field, or the second of a doubled one
                quoted = passed + mark.start() in (field_start, closed)
            else:
                line += 1
                if not quoted:
                    fits = size + mark.start() - begin <= max_bytes
                    content = bytes(held) + part[begin : mark.start()] if fits else b""
                    yield Record(number, size + mark.end() - begin, content, "" if fits else "too_long")
                    held, size, begin, number, field_start = bytearray(), 0, mark.end(), line, passed + mark.end()
        size += len(part) - begin
        passed += len(part)
        if size <= max_bytes:
            held += part[begin:]
        else:
            held = bytearray()
    if quoted:
        raise Refusal(f"{name}:{number}: a quote in the row that begins here is never closed; close or remove it")
    if size:
        yield Record(number, size, bytes(held), "" if size <= max_bytes else "too_long")


def json_text(line: str, key: str) -> str:
    """The text of one line of .jsonl.

    Raises:
        Dropped: it is not JSON, or has no text under the key.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise Dropped("bad_json", f"not JSON ({problem})") from None
    text = content.get(key) if isinstance(content, dict) else None
    if not isinstance(text, str):
        found = f"its keys: {listed(content)}" if isinstance(content, dict) else "it is no JSON object"
        raise Dropped("no_text", f"no text under the key {key!r} (ingest.text_column); {found}")
    return text


def csv_fields(row: str) -> list[str]:
    """The fields of one row: separated by commas, quoted by double quotes, which are doubled inside.

    Raises:
        Dropped: a closing quote is not followed by a comma.
    """
    fields, position = [], 0
    while field := CSV_FIELD.match(row, position):
        fields.append(field[2] if field[1] is None else field[1].replace('""', '"'))
        position = field.end()
        if not field[3]:
            return fields
    raise Dropped("bad_csv", "a closing quote is not followed by a comma")


def csv_column(header: Record, name: str, column: str) -> Callable[[str], str]:
    """The function from a row to its text.

    Raises:
        Refusal: not exactly one column has the name.
    """
    try:
        columns = csv_fields(header.content.decode("utf-8", "replace"))
    except Dropped as why:
        raise Refusal(f"{name}:1: the header row is broken: {why.detail}") from None
    if columns.count(column) != 1:
        raise Refusal(
            f"{name}:1: {columns.count(column)} columns are called {column!r} (ingest.text_column); the first row "
            f"names the columns, separated by commas: {listed(columns)}"
        )
    index = columns.index(column)

    def text_of(row: str) -> str:
        fields = csv_fields(row)
        if len(fields) != len(columns):
            raise Dropped("bad_csv", f"{len(fields)} columns where the header has {len(columns)}; quote the commas")
        return fields[index]

    return text_of
