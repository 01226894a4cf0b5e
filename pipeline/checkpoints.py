"""The state of a training run on disk: written beside training, whole or not at all, and checked before it is used.

    checkpoint-00000100/   masters and moments (safetensors), the rest of the state (JSON), and a manifest of SHA-256
    best-00000050/         the model folder of the best evaluation before that step, named in the state with its SHA-256

The files of a checkpoint are fsynced, then the manifest is written, the folder fsynced and renamed, and its parent
fsynced. Kept are the newest two, and the newest of those saved at a fixed interval: where a run goes back to does
not depend on when somebody interrupted it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import files
from pipeline.files import MANIFEST
from pipeline.stage import Refusal, reason

TENSORS, STATE = "tensors.safetensors", "state.json"
NAME = re.compile(r"checkpoint-(\d{8,})")
NUM_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `step` steps; data order and dropout follow from the step.

    The state has `best` (step and SHA-256 of the best model so far) and `rows` (bytes and SHA-256), and what the caller
    put there.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    rows_sha256: hashlib._Hash | None = None  # of one that was read: of its rows, to go on with


class Checkpoints:
    """The checkpoints of one run's folder.

    Args:
        rows_file: the rows of the run; a checkpoint knows their number of bytes and their SHA-256.
        interval: of the regular checkpoints, in steps.
    """

    def __init__(self, folder: Path, rows_file: Path, interval: int) -> None:
        self.folder, self.rows_file, self.interval = folder, rows_file, interval
        self._damaged: set[Path] = set()

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and delete what it makes superfluous.

        Raises:
            Refusal: there is no room, or the disk fails.
        """
        path = self.folder / f"checkpoint-{checkpoint.step:08d}"
        with whole_folder(path) as beside:
            files.fsync(self.rows_file)
            write(beside, checkpoint.tensors, checkpoint.state | {"step": checkpoint.step})
        self._damaged.discard(path)
        for other in self._paths():
            if other > path or other in self._damaged:  # a newer one is damaged, or we would have gone on from there
                shutil.rmtree(other)
        self.prune()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is as it was written, with the rows and the best model that belong to it."""
        for path in reversed(self._paths()):
            try:
                return self._read(path)
            except Exception as problem:  # whatever a byte that nobody wrote makes a library raise
                print(f"train: {path} is damaged ({reason(problem)}); going back to the one before", flush=True)
                self._damaged.add(path)
        return None

    def go_back(self) -> None:
        """Delete every checkpoint after the newest regular one."""
        for path in reversed(self._paths()):
            if self._is_regular(path):
                break
            shutil.rmtree(path)

    def prune(self) -> None:
        """Delete all but the newest two and the newest regular one, and the models that none of them names."""
        paths = self._paths()
        kept = {*paths[-NUM_KEPT:], *[path for path in paths if self._is_regular(path)][-1:]}
        for path in paths:
            if path not in kept:
                shutil.rmtree(path)
        named = set()
        for path in kept:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one names none
                named.add(files.read_json(path / STATE)["best"]["step"])
        for path in sorted(self.folder.glob("best-*"))[:-1]:  # the last may belong to a checkpoint to come
            if _step_of(path) not in named:
                shutil.rmtree(path)

    def best(self, step: int) -> Path:
        """The model folder of the best evaluation, if that was after `step` steps."""
        return self.folder / f"best-{step:08d}"

    def regular_step(self) -> int:
        """The step of the newest regular checkpoint; 0: there is none."""
        return max((_step_of(path) for path in self._paths() if self._is_regular(path)), default=0)

    def _read(self, path: Path) -> Checkpoint:
        tensors, state = read(path)
        rows_sha256 = files.sha256_of_head(self.rows_file, state["rows"]["num_bytes"])
        if rows_sha256.hexdigest() != state["rows"]["sha256"]:
            raise ValueError(f"{self.rows_file.name} has other rows")
        best = state["best"]
        if best["sha256"] is not None and files.sha256_of(self.best(best["step"])) != best["sha256"]:
            raise ValueError(f"{self.best(best['step']).name} has changed")
        return Checkpoint(state["step"], tensors, state, rows_sha256)

    def _is_regular(self, path: Path) -> bool:
        return _step_of(path) % self.interval == 0

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("checkpoint-*") if NAME.fullmatch(path.name))


def _step_of(path: Path) -> int:
    """The step in the name of a folder."""
    return int(path.name.partition("-")[2])


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A whole folder of a run or none, as `files.whole_folder`; what the disk does to it is one sentence.

    Raises:
        Refusal: there is no room, or the disk fails.
    """
    try:
        with files.whole_folder(path) as beside:
            yield beside
    except (OSError, SafetensorError) as problem:
        raise Refusal(
            f"{path} could not be written: {problem}. The checkpoints before it are whole: make room, or mend the "
            "disk, and the same command goes on from there"
        ) from None


def write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and state into a folder, and then the manifest that says what they must be."""
    save_file(tensors, folder / TENSORS)
    files.write_json(folder / STATE, state)
    files.fsync(folder / TENSORS)
    files.write_json(folder / MANIFEST, {name: files.sha256_of(folder / name) for name in (TENSORS, STATE)})


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote, after comparing every byte with the manifest.

    Raises:
        ValueError: a file is not what the manifest says, or the manifest names others.
        OSError, Refusal: a file cannot be read.
    """
    manifest = files.read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or set(manifest) != {TENSORS, STATE}:
        raise ValueError("its manifest is not one")
    for name, digest in manifest.items():
        if files.sha256_of(folder / name) != digest:
            raise ValueError(f"{name} has changed")
    return load_file(folder / TENSORS), files.read_json(folder / STATE)


class Background:
    """Does one thing at a time on a thread of its own, so that training goes on meanwhile."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` once what was begun before is done; whatever that raised is raised here."""
        self.wait()
        self._running = self._executor.submit(work)

    def close(self) -> None:
        """Return when nothing is being done, whatever came of it."""
        self._executor.shutdown(wait=True)

    def wait(self) -> None:
        """Return when nothing is being done any more; raises what the work raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()
