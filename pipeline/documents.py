"""Files of documents: parquet with string columns, written and read in pieces that fit in memory.

The bytes written depend on the rows and on pyarrow's version alone. Every page has a checksum,
because nothing between the disk and here would notice a flipped bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.stage import Refusal, reason

ROW_GROUP_ROWS = 4096
ROW_GROUP_CHARACTERS = 4 * 2**20  # encoding a group takes about 25 bytes a character


def count(path: Path) -> int:
    """Number of documents in the file, from its footer."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def read(path: Path, *columns: str) -> Iterator[tuple[list[str], ...]]:
    """Yield the columns of one row group after the other, in file order.

    Raises:
        Refusal: the file is damaged.
    """
    with _opened(path) as file:
        kinds = [str(file.schema_arrow.field(name).type) for name in columns]
        if set(kinds) != {"string"}:
            raise ValueError(f"its columns {', '.join(columns)} are of type {', '.join(kinds)}, not string")
        for index in range(file.num_row_groups):
            table = file.read_row_group(index, columns=list(columns))
            if any(table.column(name).null_count for name in columns):
                raise ValueError("it has empty cells")
            yield tuple(table.column(name).to_pylist() for name in columns)


def write(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Write rows of strings as they come, holding one row group at a time."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    # No dictionary: texts and hashes hardly repeat.
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pyarrow.parquet.ParquetWriter(path, schema, **options) as writer:
        for group in _groups(rows):
            arrays = [pyarrow.array(column, pyarrow.string()) for column in zip(*group, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _groups(rows: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Rows in lists that are bounded in rows and in characters."""
    group: list[tuple[str, ...]] = []
    num_characters = 0
    for row in rows:
        group.append(row)
        num_characters += sum(map(len, row))
        if len(group) == ROW_GROUP_ROWS or num_characters >= ROW_GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as source:
        try:
            yield pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
        except Exception as problem:  # pyarrow passes on whatever a damaged byte makes it raise
            raise Refusal(
                f"{path} is damaged ({reason(problem)}): restore it with "
                f"`dvc checkout --force {path.parent}`, or delete it and run `dvc repro` again"
            ) from None
