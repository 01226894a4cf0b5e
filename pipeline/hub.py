"""Datasets of the Hugging Face Hub as records, streamed at a pinned revision."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.records import Record, Tally, listed
from pipeline.stage import Refusal, reason

if TYPE_CHECKING:
    from pipeline.ingest import Params


def records(dataset: str, ingest: Params, tally: Tally) -> Iterator[Record]:
    """The text column of a dataset, in the dataset's order; code of the dataset's own is never run.

    Raises:
        Refusal: it cannot be reached, or has no such split, configuration or column.
    """
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it retries five times and warns each time
    try:
        rows = datasets.load_dataset(
            dataset, ingest.hf_config, split=ingest.hf_split, revision=ingest.hf_revision, streaming=True
        )
        columns = rows.column_names or [ingest.text_column]  # unknown before the first row of some formats
        if ingest.text_column not in columns:
            found = listed(columns)
            raise Refusal(
                f"hf:{dataset} has no column {ingest.text_column!r} (ingest.text_column); its columns: {found}"
            )
        for number, row in enumerate(rows, start=1):
            text = row.get(ingest.text_column)
            content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
            tally.bytes_in += len(content)
            too_long = len(content) > ingest.max_document_bytes
            dropped = "no_text" if not isinstance(text, str) else "too_long" if too_long else ""
            yield Record(number, len(content), content, dropped)
    except Refusal:
        raise
    except Exception as problem:  # `datasets` passes on whatever its many formats and transports raise
        offline = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        raise Refusal(
            f"hf:{dataset} at revision {ingest.hf_revision} could not be read{offline}: {reason(problem)}; "
            "without a network, put its files (.parquet, .jsonl, .csv) into data/source and set ingest.source to files"
        ) from None
