"""Files that have broken other people's readers, each made by a few lines of code; none is committed."""

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MEGABYTE = 10**6


def parquet(path: Path, values: Any, **options: Any) -> None:
    kind = None if isinstance(values, pa.Array) else pa.string()
    table = pa.table({"text": values if kind is None else pa.array(values, kind)})
    pq.write_table(table, path, **{"compression": "zstd", "use_dictionary": False, "store_schema": False} | options)


def repeated(value: str, number: int) -> pa.Array:
    """The value so many times, held once; written with a dictionary, the file holds it once too."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array([value]))


def packed(path: Path, content: bytes, number: int = 1) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(number):
            file.write(content)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped.txt", b"out of the folder")
        archive.writestr("/etc/passwd", bytes(10 * MEGABYTE))


def cut(path: Path, write: Callable[[Path], None]) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-20])


def gzipped_parquet_bomb(path: Path) -> None:
    parquet(path.with_suffix(""), repeated("x" * 20 * MEGABYTE, 100), use_dictionary=True)
    packed(path, path.with_suffix("").read_bytes())
    path.with_suffix("").unlink()


# A file name, and what writes the file.
FILES: dict[str, Callable[[Path], object]] = {
    # compression
    "cut.txt.gz": lambda path: cut(path, lambda it: packed(it, os.urandom(9000))),
    "cut.parquet": lambda path: cut(path, lambda it: parquet(it, ["a text"] * 99)),
    "zeros.txt.gz": lambda path: packed(path, bytes(MEGABYTE), 50),
    "zeros.jsonl.gz": lambda path: packed(path, bytes(MEGABYTE), 50),
    "zeros.csv.gz": lambda path: packed(path, bytes(MEGABYTE), 50),
    "newlines.txt.gz": lambda path: packed(path, b"\n" * MEGABYTE),
    "twice.txt.gz": lambda path: path.write_bytes(gzip.compress(gzip.compress(b"text"))),
    "members.txt.gz": lambda path: path.write_bytes(gzip.compress(b"one\n") * 3 + b"rubbish"),
    "archive.zip": zipped,
    "archive.txt": zipped,
    "archive.tar.gz": lambda path: packed(path, b"no archive"),
    # parquet that unpacks to gigabytes
    "one_long_row.parquet": lambda path: parquet(path, ["x" * 100 * MEGABYTE]),
    "dictionary.parquet": lambda path: parquet(path, repeated("x" * 100 * MEGABYTE, 1000), use_dictionary=True),
    "small_dictionary.parquet": lambda path: parquet(path, repeated("x" * 10 * MEGABYTE, 1000), use_dictionary=True),
    "prefixes.parquet": lambda path: parquet(
        path, ["x" * 30 * MEGABYTE] * 10, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    ),
    "rows.parquet": lambda path: parquet(path, repeated("the same", 3 * MEGABYTE), use_dictionary=True),
    "nulls.parquet": lambda path: parquet(path, pa.nulls(3 * MEGABYTE, pa.string())),
    "bomb.parquet.gz": gzipped_parquet_bomb,
    # JSON
    "deep.jsonl": lambda path: path.write_bytes(b"[" * 900_000 + b"\n" + b'{"text":' * 100_000),
    "wide.jsonl": lambda path: path.write_bytes(b'{"text": [' + b"[]," * 300_000 + b"[]]}"),
    "numbers.jsonl": lambda path: path.write_text(
        '{"text": "1", "n": 1e999999999}\n{"text": "2", "n": ' + "9" * 900_000 + '}\n{"text": -Infinity}\n{"text": NaN}'
    ),
    "keys.jsonl": lambda path: path.write_text(json.dumps({f"\x1b[2J{i}\n": i for i in range(30_000)})),
    "surrogates.jsonl": lambda path: path.write_text('{"text": "' + "\\ud800\\udfff\\udfff" * 50_000 + '"}'),
    "duplicates.jsonl": lambda path: path.write_text(
        '{"text": 1, "text": "two", "text": "three"}\n{"text": "4", "text": []}'
    ),
    # CSV
    "quotes.csv": lambda path: path.write_bytes(b"text\n" + b'"' * 2 * MEGABYTE),
    "open_quote.csv": lambda path: path.write_bytes(b'text\n"' + b"a,b\n" * MEGABYTE),
    "commas.csv": lambda path: path.write_bytes(b"text\n" + b"," * 900_000 + b"\nfine\n"),
    "columns.csv": lambda path: path.write_bytes(b"c," * 400_000 + b"text\n" + b"," * 400_000 + b"fine\n"),
    "header.csv": lambda path: path.write_bytes(b"text" * 300_000 + b"\nfine\n"),
    # text
    "line.txt": lambda path: path.write_bytes(b"no end " * 1_500_000),
    "nuls.txt": lambda path: path.write_bytes(bytes(900_000)),
    "returns.txt": lambda path: path.write_bytes(b"\r" * 900_000),
    "separators.txt": lambda path: path.write_text("a\u2028b\u2029c\x85" * 100_000),
    "marks.txt": lambda path: path.write_text("a" + "\u0301\u200b\u0323\u200b" * 80_000, encoding="utf-8"),
    "late_marks.txt": lambda path: path.write_text("a" + "\u0f73\u0f81" * 150_000, encoding="utf-8"),
    "invalid.txt": lambda path: path.write_bytes(b"\xff\xc0\x80\xed\xa0\x80\xf5" * 100_000),
    "bom.txt": lambda path: path.write_bytes(b"\xef\xbb\xbf" * 300_000),
    "utf-16.txt": lambda path: path.write_bytes("a text".encode("utf-16")),
    "empty.parquet": lambda path: path.write_bytes(b""),
}


def strange_folder(folder: Path) -> None:
    """What a folder can hold besides ordinary files under ordinary names."""
    folder.mkdir()
    (folder / "good.txt").write_text("a good document, long enough to be kept\n")
    for name in (
        "-rf.txt",
        "new\nline.txt",
        "quote'\".txt",
        "\x1b[2J.txt",
        "$(touch x).txt",
        "*.txt",
        " .txt",
        "é" * 120 + ".txt",
    ):
        (folder / name).write_text(f"the text in a file called {name!r}")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt")).write_text("the name of this file is not UTF-8 at all")
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe.parquet")
    for name, aim in {
        "loop.txt": "loop.txt",
        "zero.txt": "/dev/zero",
        "full.txt": "/dev/full",
        "up": "..",
        "random.parquet": "/dev/urandom",
    }.items():
        (folder / name).symlink_to(aim)
    with (folder / "hole.txt").open("wb") as file:
        file.truncate(20 * MEGABYTE)
    deep = folder
    for _ in range(60):
        deep = deep / "deeper"
        deep.mkdir()
    (deep / "found.txt").write_text("a document at the bottom of sixty folders")
