"""ingest: bytes of any supported kind become documents.

Reads data/source/ (or the demo corpus, or a dataset of the Hub), writes data/raw/documents.parquet (columns text,
source) and reports/ingest.json (what was kept and dropped, by reason). The only stage that meets formats and encodings.

    python -m pipeline.ingest
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pydantic
from tqdm import tqdm

from pipeline import demo, documents, files, hub, records, sources, stage
from pipeline.stage import Refusal

HUB_ID = re.compile(r"hf:(?:[\w.-]+/)?[\w.-]+", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


class Params(stage.Params):
    """Section `ingest` of params.yaml."""

    source: str
    demo_documents: int = pydantic.Field(ge=1, le=200_000)
    txt_documents: Literal["lines", "files"]
    text_column: str = pydantic.Field(min_length=1)
    invalid_utf8: Literal["replace", "drop", "refuse"]
    max_document_bytes: int = pydantic.Field(ge=1, le=500_000_000)  # a parquet page ends at 2 GB, U+FFFD has 3 bytes
    hf_revision: str | None
    hf_config: str | None
    hf_split: str = pydantic.Field(min_length=1)

    @pydantic.field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        if source not in ("demo", "files") and not HUB_ID.fullmatch(source):
            raise ValueError("should be demo, files or hf:OWNER/NAME")
        return source

    @pydantic.model_validator(mode="after")
    def _hub_is_pinned(self) -> Params:
        if self.source.startswith("hf:"):
            if not COMMIT.fullmatch(self.hf_revision or ""):
                raise ValueError(
                    f"source {self.source} needs in hf_revision the 40 digits of a commit (on the Hub: the dataset's "
                    f"page, Files, History), not {self.hf_revision!r}"
                )
        elif self.hf_revision is not None or self.hf_config is not None:
            raise ValueError(f"hf_revision and hf_config have no meaning with source: {self.source}; set them to null")
        return self


def read(folder: Path, scratch: Path, ingest: Params, tally: records.Tally) -> Iterator[tuple[str, str]]:
    """All documents with their source, in an order that depends on names and contents alone."""
    if ingest.source == "demo":
        stream = io.BytesIO(demo.corpus(ingest.demo_documents))
        lines = sources.split(sources.chunks(stream, "demo", tally), sources.LINE, "demo", ingest.max_document_bytes)
        for text in records.documents(lines, str, "demo", ingest, tally):
            yield text, "demo"
    elif ingest.source == "files":
        for path in sources.find_files(folder, tally):
            name = sources.name_of(path, folder)
            for text in sources.read_file(path, name, ingest, tally, scratch):
                yield text, name
    else:
        dataset = ingest.source.removeprefix("hf:")
        if Path(dataset).exists():  # `datasets` would take the folder, which no revision pins
            raise Refusal(f"ingest.source: {dataset} is also a path here; move it, or read it from data/source")
        rows = hub.records(dataset, ingest, tally)
        for text in records.documents(rows, str, ingest.source, ingest, tally):
            yield text, ingest.source


def refuse_nothing(folder: Path, ingest: Params, tally: records.Tally) -> None:
    """Refuse to go on without a document, and say what was found instead."""
    if tally.documents_kept:
        return
    if tally.files_read or tally.documents_in:
        found = [f"{count} {reason}" for reason, count in tally.documents_dropped.items() if count]
        raise Refusal(f"ingest.source: {ingest.source} gave no document; dropped: {', '.join(found) or 'nothing'}")
    found = [f"{reason} ({records.listed(names)})" for reason, names in sorted(tally.files_skipped.items())]
    raise Refusal(
        f"{folder} has nothing to read{', only ' + '; '.join(found) if found else ''}: put .txt, .jsonl, .csv or "
        ".parquet files there (or .gz of these), or set ingest.source to demo"
    )


def main(paths: stage.Paths, ingest: Params) -> None:
    """Read every document, write it, report what happened."""
    tally = records.Tally()
    with files.whole_folder(paths["raw"]) as raw:
        found = read(paths["source"], raw, ingest, tally)
        progress = tqdm(found, "ingest", unit=" documents", disable=None)
        documents.write(raw / "documents.parquet", ("text", "source"), progress)
        refuse_nothing(paths["source"], ingest, tally)
    files.write_json(paths["ingest.json"], tally.report())
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in tally.documents_dropped.items() if count)
    print(f"ingest: kept {tally.documents_kept:,} of {tally.documents_in:,} documents (dropped: {dropped or 'none'})")
    for reason, names in sorted(tally.files_skipped.items()):
        print(f"ingest: skipped {reason}: {records.listed(names)}")


if __name__ == "__main__":
    stage.run("ingest", main)
