"""The text column of a parquet file as records, whatever the file claims to hold.

The format lets a kilobyte stand for gigabytes: a page compressed a thousandfold, a row that is a number in a
dictionary, a row told by its difference from the one before. So rows come one at a time, in a process that may not
grow much, and a file that unpacks to more than text can is refused.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pipeline.records import Record, Tally, listed
from pipeline.stage import Refusal, reason

if TYPE_CHECKING:
    from pipeline.ingest import Params

TEXT_TYPES = ("string", "large_string", "string_view")
BUFFER_BYTES = 2**18
MEMORY_BYTES = 2 * 2**30  # besides 16 documents of the largest size
# What a file may unpack to: 1,100 times its bytes (gzip cannot do more) and 30 MB, a row counting 100 bytes at least.
# A parquet file of a kilobyte can claim billions of rows, or one of gigabytes.
MAX_EXPANSION = 1100
MAX_EXPANSION_BYTES = 3 * 10**7


def records(file: IO[bytes], name: str, ingest: Params, tally: Tally) -> Iterator[Record]:
    """The text column of a parquet file, a row at a time.

    Raises:
        Refusal: damaged, or no text in a column of that name, or it unpacks to far more than any text does.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.allocate_buffer(1)  # pyarrow reserves a gigabyte of addresses at its first allocation; let that be behind us
    column, number, unpacked = ingest.text_column, 0, 0
    largest = MAX_EXPANSION * file.seek(0, os.SEEK_END) + MAX_EXPANSION_BYTES
    bomb = f"{name} unpacks to more than {MAX_EXPANSION:,} times its size, which no text does: move it away"
    try:
        with memory_limit(MEMORY_BYTES + 16 * ingest.max_document_bytes):
            # With a buffer, and not read ahead, a column comes by the page; else by the row group, however large.
            reader = pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
            types = [(field.name, str(field.type)) for field in reader.schema_arrow]
            if [kind in TEXT_TYPES for field, kind in types if field == column] != [True]:
                found = listed(f"{field} ({kind})" for field, kind in types)
                raise Refusal(
                    f"{name}: not one column {column!r} (ingest.text_column) of type string; its columns: {found}"
                )
            # Asking for a single column's size would end the process where a damaged byte contradicts the schema.
            groups = [reader.metadata.row_group(index).total_byte_size for index in range(reader.num_row_groups)]
            if sum(groups) > largest:
                raise Refusal(bomb)
            # One row at a time: told by its difference from the row before, or by its number in a dictionary, each can
            # be as long as all of its group.
            for batch in reader.iter_batches(batch_size=1, columns=[column], use_threads=False):
                for value in batch.column(0):
                    number += 1
                    content = value.as_buffer() if value.is_valid else b""  # parquet does not promise UTF-8
                    unpacked += max(100, len(content))
                    if unpacked > largest:
                        raise Refusal(bomb)
                    tally.bytes_in += len(content)
                    fits = len(content) <= ingest.max_document_bytes
                    dropped = "no_text" if not value.is_valid else "" if fits else "too_long"
                    yield Record(number, len(content), bytes(content) if fits else b"", dropped)
    except Refusal:
        raise
    except MemoryError:
        raise Refusal(
            f"{name} has rows or pages so large that one does not fit into memory: write it again with smaller row "
            "groups, or raise ingest.max_document_bytes if its documents are that large"
        ) from None
    except Exception as problem:  # pyarrow passes on whatever a damaged byte makes it raise
        raise Refusal(
            f"{name} is damaged or no parquet file ({reason(problem)}): fetch it again, or write it again"
        ) from None


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Let this process take that much more memory, on Linux; what would take more raises a MemoryError."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    soft = held + num_bytes if before[0] == resource.RLIM_INFINITY else min(before[0], held + num_bytes)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
