"""Token-exact losses of documents, each measured by itself: the one way that this pipeline measures a model.

Training measures through it while it runs, `evaluate` at the end, so their numbers can be compared.

Letters of tensor names: B pieces of documents in a batch, T positions (predicted tokens), V vocabulary,
D documents, P pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pipeline.corpus import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.calibration import Calibration

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

IGNORED = -100  # cross_entropy's own mark of a target that does not count
# Logits are by far the largest tensor of a forward pass (GPT-2: 201 kB a position in float32), so it is their
# number that bounds a batch: 2**27 float32 are 512 MiB, whatever the vocabulary and the batch size.
MAX_LOGITS = 2**27


class Stopped(Exception):
    """Measuring was asked to stop, and not all documents are measured."""


@dataclass(frozen=True)
class DocumentLosses:
    """Losses of D documents, each field an array of D."""

    documents: Ints  # indices into the corpus
    nats: Floats  # cross-entropy of a document, summed over its predicted tokens
    num_tokens: Ints  # predicted tokens of a document: its tokens and EOS

    @property
    def mean(self) -> float:
        """Cross-entropy in nats per predicted token, every token weighing the same."""
        return float(self.nats.sum() / self.num_tokens.sum())


@dataclass(frozen=True)
class _Pieces:
    """Parts of documents no longer than the window, the longest first; each field an array of P."""

    owner: Ints  # position of the document in `documents`
    begin: Ints  # first target of the piece, counted within its document
    length: Ints  # targets


def measure(
    model: PreTrainedModel,
    corpus: Corpus,
    documents: Ints,
    *,
    max_length: int,
    batch_size: int,
    device: torch.device,
    progress: str | None = None,
    calibration: Calibration | None = None,
    stop: Callable[[], bool] | None = None,
) -> DocumentLosses:
    """Measure documents, each by itself, in evaluation mode.

    A document t1..tn is predicted from start,t1..tn; its targets are t1..tn,EOS. What is longer than
    `max_length` is cut into consecutive pieces that each begin at position 0, so every target counts
    exactly once. Neither `batch_size` nor the order or company of the documents changes a loss beyond rounding.

    Args:
        model: any causal language model, already on `device`.
        documents: indices into `corpus`, int64.
        max_length: positions of the window, at most the model's.
        batch_size: pieces a forward pass; fewer where their logits would exceed MAX_LOGITS.
        progress: label of a progress bar, shown on terminals alone.
        calibration: where every prediction is counted too, if that is asked for; it changes no loss.
        stop: asked before every forward pass.

    Returns:
        The losses in the order of `documents`; log-softmax in float32, sums in float64.

    Raises:
        Stopped: `stop` said so.
    """
    assert max_length > 0 and batch_size > 0
    pieces = _cut(corpus, documents, max_length)
    nats_D = np.zeros(len(documents), np.float64)
    was_training = model.training
    model.eval()
    # Opened here, not around each batch: the bar counts tokens, the unit of the work.
    bar = tqdm(total=int(pieces.length.sum()), desc=progress, unit="token", unit_scale=True, leave=False,
               disable=None if progress else True)  # fmt: skip
    try:
        with torch.inference_mode(), bar:
            for batch in _batches(pieces, batch_size, corpus.vocabulary_size):
                if stop is not None and stop():
                    raise Stopped
                inputs_BT, targets_BT = _tensors(corpus, documents, pieces, batch)
                on_device_BT = nats(model, inputs_BT.to(device), targets_BT.to(device), calibration)
                nats_BT = on_device_BT.cpu().numpy().astype(np.float64)
                for piece, nats_T in zip(batch, nats_BT, strict=True):
                    nats_D[pieces.owner[piece]] += nats_T[: pieces.length[piece]].sum()
                bar.update(int(pieces.length[batch].sum()))
    finally:
        model.train(was_training)
    return DocumentLosses(documents, nats_D, _num_targets(corpus, documents))


def fixed_sample(corpus: Corpus, documents: Ints, size: int) -> Ints:
    """At most `size` of the documents, ascending: those with the smallest hashes.

    A random choice as far as the text is concerned, the same in every run, and hardly another when text is added.
    """
    chosen = np.argsort(corpus.hashes[documents], kind="stable")[:size]
    return np.sort(documents[chosen])


def _num_targets(corpus: Corpus, documents: Ints) -> Ints:
    return np.asarray(corpus.offsets[documents + 1] - corpus.offsets[documents] + 1, dtype=np.int64)


def _cut(corpus: Corpus, documents: Ints, max_length: int) -> _Pieces:
    """Cut documents into pieces; sort them by length, so that a batch pads little."""
    targets_D = _num_targets(corpus, documents)
    pieces_D = -(-targets_D // max_length)
    owner_P = np.repeat(np.arange(len(documents)), pieces_D)
    begin_P = (np.arange(len(owner_P)) - np.repeat(pieces_D.cumsum() - pieces_D, pieces_D)) * max_length
    length_P = np.minimum(targets_D[owner_P] - begin_P, max_length)
    # Longest first: if memory is too small for a batch, it is the first one that says so.
    order_P = np.argsort(-length_P, kind="stable")
    return _Pieces(owner_P[order_P], begin_P[order_P], length_P[order_P])


def _batches(pieces: _Pieces, batch_size: int, vocabulary_size: int) -> Iterator[Ints]:
    """Indices of the pieces of each forward pass, at most `batch_size` and at most MAX_LOGITS logits, never none."""
    first = 0
    while first < len(pieces.length):
        widest = int(pieces.length[first])
        size = num_pieces_at_once(batch_size, widest, vocabulary_size)
        yield np.arange(first, min(first + size, len(pieces.length)))
        first += size


def _tensors(corpus: Corpus, documents: Ints, pieces: _Pieces, batch: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a batch, int64, padded on the right."""
    shape = len(batch), int(pieces.length[batch[0]])
    inputs_BT = np.full(shape, corpus.end_id, np.int64)  # padding: any id that exists, nobody looks at it
    targets_BT = np.full(shape, IGNORED, np.int64)
    for row, piece in enumerate(batch):
        begin, length = int(pieces.begin[piece]), int(pieces.length[piece])
        ids = _ids(corpus, int(documents[pieces.owner[piece]]), begin, length + 1)
        inputs_BT[row, :length] = ids[:-1]
        targets_BT[row, :length] = ids[1:]
    return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)


def _ids(corpus: Corpus, document: int, begin: int, length: int) -> Ints:
    """`length` ids of start,t1..tn,EOS from position `begin` on, reading no more of the file than these."""
    first, last = int(corpus.offsets[document]), int(corpus.offsets[document + 1])
    inside = corpus.tokens[first + max(begin, 1) - 1 : min(first + begin + length - 1, last)]
    ends_here = begin + length == last - first + 2
    return np.concatenate(
        [[corpus.start_id] if begin == 0 else [], inside, [corpus.end_id] if ends_here else []], dtype=np.int64,
        casting="unsafe",
    )  # fmt: skip


def num_pieces_at_once(batch_size: int, length: int, vocabulary_size: int) -> int:
    """At most `batch_size` pieces of `length` targets, and at most MAX_LOGITS logits, but never none."""
    return max(1, min(batch_size, MAX_LOGITS // (length * vocabulary_size)))


def nats(
    model: PreTrainedModel,
    inputs_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    calibration: Calibration | None = None,
) -> torch.Tensor:
    """Cross-entropy of every target in float32, 0 where there is padding.

    Attention is causal, so padding on the right changes nothing before it and needs no mask.
    """
    logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
    # A piece at a time: the float32 copy and the log-softmax take the memory of one piece, not of the batch.
    return torch.stack(
        [
            _of_piece(logits_TV.float(), targets_T, calibration)
            for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True)
        ]
    )


def _of_piece(logits_TV: torch.Tensor, targets_T: torch.Tensor, calibration: Calibration | None) -> torch.Tensor:
    nats_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="none")
    if calibration is not None:
        calibration.add(logits_TV, targets_T, nats_T)
    return nats_T
