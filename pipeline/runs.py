"""The folder of one training run while it is unfinished: its rows, its checkpoints, its models.

It lies outside what DVC manages, keyed by a fingerprint of everything that decides the result, so an interrupted run
goes on, a changed one starts clean, and a finished one has nothing left to do:

    .runs/<fingerprint>/train.jsonl          a row a step
    .runs/<fingerprint>/checkpoint-00000100/ best-00000050/     see pipeline/checkpoints.py
    .runs/<fingerprint>/best/ last/          model folders of a finished run
    .runs/<fingerprint>/manifest.json        SHA-256 of every file of rows, best/ and last/; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import files
from pipeline.files import MANIFEST
from pipeline.stage import Refusal

ROOT = Path(".runs")


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides the result of a run."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Run:
    """The folder of the run with this fingerprint."""

    def __init__(self, run_fingerprint: str) -> None:
        self.folder = ROOT / run_fingerprint[:16]
        self.rows_file = self.folder / "train.jsonl"
        self.best = self.folder / "best"
        self.last = self.folder / "last"
        self._rows: BinaryIO | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, and close the rows in the end. `pipeline/owner.py` has seen to it that it is ours alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            if self._rows is not None:
                self._rows.close()

    @property
    def finished(self) -> bool:
        """Whether the run is trained to its end, and what it left is as it was written."""
        marker = self.folder / MANIFEST
        if not marker.exists():
            return False
        try:
            if files.read_json(marker) == self._results():
                return True
        except (OSError, Refusal):
            pass
        print(f"train: the results in {self.folder} are damaged; training again", flush=True)
        marker.unlink()
        return False

    def finish(self) -> None:
        """Mark the run as finished: rows, best/ and last/ are whole."""
        files.write_json(self.folder / MANIFEST, self._results())

    def start_rows(self, num_bytes: int = 0, sha256: hashlib._Hash | None = None) -> None:
        """Open the rows for appending, cut to their bytes at the checkpoint, whose running SHA-256 is `sha256`."""
        if self._rows is not None:
            self._rows.close()
        self._rows = self.rows_file.open("a+b")
        self._rows.truncate(num_bytes)
        self._rows.seek(0, os.SEEK_END)
        self._sha256 = hashlib.sha256() if sha256 is None else sha256

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append one row, whole."""
        assert self._rows is not None
        line = json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n"
        self._rows.write(line)
        self._rows.flush()
        self._sha256.update(line)

    def rows_so_far(self) -> dict[str, Any]:
        """Bytes and SHA-256 of the rows."""
        assert self._rows is not None
        return {"num_bytes": self._rows.tell(), "sha256": self._sha256.hexdigest()}

    def clean_up(self) -> None:
        """After the end: drop the resume state of this run, and other runs that are finished."""
        for superfluous in [*self.folder.glob("checkpoint-*"), *self.folder.glob("best-*")]:
            shutil.rmtree(superfluous)
        for other in ROOT.iterdir():
            if other != self.folder and (other / MANIFEST).is_file():
                shutil.rmtree(other)

    def _results(self) -> dict[str, str]:
        results = [*files.listing(self.best), *files.listing(self.last), self.rows_file]
        return {path.relative_to(self.folder).as_posix(): files.sha256_of(path) for path in results}
