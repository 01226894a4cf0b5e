"""The tokens of all documents, as the tokenize stage wrote them, mapped into memory.

Files of the folder: `tokens.bin` (flat, little-endian, uint16 or uint32), `offsets.npy` (int64, N+1:
document i is tokens[offsets[i]:offsets[i+1]], without any control token), `num_bytes.npy` (int64, N: UTF-8 bytes of
each document's text), `hashes.npy` (uint64, N: the first 8 bytes of the SHA-256 of the text, big-endian),
`tokens.json` (vocabulary_size, start_id, end_id), `tokenizer/` (a Hugging Face tokenizer folder).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import files
from pipeline.stage import Refusal

Ints = npt.NDArray[np.int64]


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
    about = files.read_json(folder / "tokens.json")
    dtype = np.dtype(np.uint16 if about["vocabulary_size"] <= 2**16 else np.uint32)
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    size = (folder / "tokens.bin").stat().st_size
    if size != int(offsets[-1]) * dtype.itemsize:
        raise Refusal(
            f"{folder / 'tokens.bin'} has {size} bytes where offsets.npy wants {int(offsets[-1]) * dtype.itemsize}: "
            "restore it with `dvc checkout --force`, or rebuild it with `dvc repro --force tokenize`"
        )
    # An empty file cannot be mapped; every real corpus has tokens.
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if size else np.empty(0, dtype)
    return Corpus(
        tokens=tokens,
        offsets=offsets,
        num_bytes=np.load(folder / "num_bytes.npy", allow_pickle=False),
        hashes=np.load(folder / "hashes.npy", allow_pickle=False),
        vocabulary_size=about["vocabulary_size"],
        start_id=about["start_id"],
        end_id=about["end_id"],
    )
