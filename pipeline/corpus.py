"""The tokens of all documents, as the tokenize stage wrote them, mapped into memory.

Files of the folder: `tokens.bin` (flat, little-endian, uint16 or uint32), `offsets.npy` (int64, N+1:
document i is tokens[offsets[i]:offsets[i+1]], without any control token), `num_bytes.npy` (int64, N: UTF-8 bytes of
each document's text), `hashes.npy` (uint64, N: the first 8 bytes of the SHA-256 of the text, big-endian),
`tokens.json` (vocabulary_size, start_id, end_id), `tokenizer/` (a Hugging Face tokenizer folder).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import files, stage
from pipeline.stage import Refusal

Ints = npt.NDArray[np.int64]

NUMBERS = ("vocabulary_size", "start_id", "end_id")  # of tokens.json


@dataclass(frozen=True)
class Corpus:
    """Token ids of N documents."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    offsets: Ints
    num_bytes: Ints
    hashes: npt.NDArray[np.uint64]
    vocabulary_size: int
    start_id: int  # what a document's first token is predicted from: BOS, or EOS where there is none
    end_id: int  # EOS: the last thing to predict of every document

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of each document, without start and end."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Ints:
        """Token ids of one document, as int64."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)


def load(folder: Path) -> Corpus:
    """Map the folder; refuse one whose parts do not fit together.

    Raises:
        Refusal: the sizes contradict each other (a truncated or foreign file).
    """
    about = files.read_json(folder / "tokens.json", *NUMBERS)
    if not all(type(about[key]) is int and 0 <= about[key] < 2**32 for key in NUMBERS):
        raise _damaged(folder / "tokens.json", f"{', '.join(NUMBERS)} are not all numbers of tokens")
    dtype = np.dtype(np.uint16 if about["vocabulary_size"] <= 2**16 else np.uint32)
    offsets = read_array(folder / "offsets.npy", np.int64)
    if not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise _damaged(folder / "offsets.npy", "it does not ascend from 0")
    size = (folder / "tokens.bin").stat().st_size
    if size != int(offsets[-1]) * dtype.itemsize:
        raise _damaged(
            folder / "tokens.bin", f"it has {size} bytes where offsets.npy wants {int(offsets[-1]) * dtype.itemsize}"
        )
    # An empty file cannot be mapped; every real corpus has tokens.
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if size else np.empty(0, dtype)
    return Corpus(
        tokens=tokens,
        offsets=offsets,
        num_bytes=read_array(folder / "num_bytes.npy", np.int64, len(offsets) - 1),
        hashes=read_array(folder / "hashes.npy", np.uint64, len(offsets) - 1),
        vocabulary_size=about["vocabulary_size"],
        start_id=about["start_id"],
        end_id=about["end_id"],
    )


def read_array(path: Path, dtype: type[np.generic], length: int | None = None) -> npt.NDArray[Any]:
    """Read a .npy file of one dimension.

    Raises:
        Refusal: it is damaged, or holds something else.
    """
    # Mapped, because a header can claim more than there is: then numpy would make room for it first.
    with stage.refused_as(lambda problem: _damaged(path, stage.reason(problem))), np.errstate(over="ignore"):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.ndim != 1 or length not in (None, len(array)):
        raise _damaged(path, f"{array.dtype} of the shape {array.shape}")
    return np.array(array)


def read_side(folder: Path, side: str, num_documents: int) -> Ints:
    """The documents of one side, as the split stage wrote them: ascending indices into a corpus of `num_documents`.

    Raises:
        Refusal: the file is damaged, or belongs to another corpus.
    """
    path = folder / f"{side}.npy"
    chosen: Ints = read_array(path, np.int64)
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= num_documents or (np.diff(chosen) <= 0).any():
        raise _damaged(path, f"no ascending indices of {num_documents:,} documents")
    return chosen


def _damaged(path: Path, fault: str) -> Refusal:
    writer = path.parent.name.replace("tokens", "tokenize")  # the stage
    return Refusal(
        f"{path} is damaged ({fault}): restore it with `dvc checkout --force`, "
        f"or rebuild it with `dvc repro --force {writer}`"
    )
