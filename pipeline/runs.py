"""The folder of one training run while it is unfinished: its rows, its checkpoints.

It lies outside what DVC manages, keyed by a fingerprint of everything that decides the result, so an interrupted run
goes on, a changed one starts clean, and a finished one has nothing left to do:

    .runs/<fingerprint>/train.jsonl          a row a step
    .runs/<fingerprint>/checkpoint-00000100/ weights, optimizer, state and a manifest of SHA-256; the newest two
    .runs/<fingerprint>/best/ last/          model folders; last/ appears when the run is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import files

ROOT = Path(".runs")
MANIFEST = "manifest.json"
NUM_KEPT = 2


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides the result of a run."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `step` steps; data order and dropout follow from the step."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Run:
    """The folder of the run with this fingerprint."""

    def __init__(self, run_fingerprint: str) -> None:
        self.folder = ROOT / run_fingerprint[:16]
        self.rows_file = self.folder / "train.jsonl"
        self.best = self.folder / "best"
        self.last = self.folder / "last"
        self._rows: TextIO | None = None

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
        """Whether the run is trained to its end."""
        return self.last.is_dir()

    def start_rows(self, num_bytes: int) -> None:
        """Open the rows for appending, cut to the length that they had at the checkpoint."""
        self._rows = self.rows_file.open("a", encoding="utf-8", newline="\n")
        self._rows.truncate(num_bytes)

    def add_row(self, row: Mapping[str, float]) -> None:
        """Append one row, whole."""
        assert self._rows is not None
        self._rows.write(json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
        self._rows.flush()

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return files.read_jsonl(self.rows_file)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whole or not at all, and delete all but the newest two."""
        assert self._rows is not None
        os.fsync(self._rows.fileno())
        state = checkpoint.state | {"num_row_bytes": self.rows_file.stat().st_size, "step": checkpoint.step}
        with files.whole_folder(self.folder / f"checkpoint-{checkpoint.step:08d}") as folder:
            save_file(
                {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()},
                folder / "tensors.safetensors",
            )
            files.write_json(folder / "state.json", state)
            files.write_json(folder / MANIFEST, {f.name: files.sha256_of(f) for f in sorted(folder.iterdir())})
        for old in self._checkpoints()[:-NUM_KEPT]:
            shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are those of its manifest, or None."""
        for folder in reversed(self._checkpoints()):
            try:
                if _is_whole(folder):
                    state = files.read_json(folder / "state.json", "step")
                    return Checkpoint(state["step"], load_file(folder / "tensors.safetensors"), state)
            except (Refusal, SafetensorError):  # whole, but nothing that we wrote
                pass
            print(f"train: {folder} is damaged; going back to the one before", flush=True)
        return None

    def clean_up(self) -> None:
        """After the end: drop the resume state of this run, and other runs that are finished."""
        for folder in self._checkpoints():
            shutil.rmtree(folder)
        for other in ROOT.iterdir():
            if other != self.folder and (other / "last").is_dir():
                shutil.rmtree(other)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds exactly the files of its manifest; a name in it is never followed out of the folder."""
    try:
        manifest = files.read_json(folder / MANIFEST)
        held = {path.name: path for path in files.listing(folder) if path != folder / MANIFEST}
        return bool(held) and manifest == {name: files.sha256_of(path) for name, path in held.items()}
    except (OSError, ValueError):
        return False
