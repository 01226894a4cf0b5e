"""Which tokens a training step sees: a function of (seed, step), never of history.

Every epoch shuffles the training documents and lays them end to end in one stream. A document of n tokens takes
n + 1 places of it: it is read from its start token on, and the last thing predicted is its end token:

    inputs    start t1 t2 ... tn | start u1 ...
    targets   t1    t2 ... tn end| u1    ...

The stream is cut into windows of T places; only the last window is padded. So no token is dropped, every token is a
target once an epoch, and where a model's start and end token are the same (GPT-2) the inputs are the usual
"documents with EOS between them". Positions count from each document's start, which is what keeps documents apart in
attention (transformers masks wherever positions begin anew). A document that a window's edge cuts goes on in the next
window with positions from 0.

Shapes: B windows, T places a window.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.corpus import Corpus, Ints

IGNORE = -100  # a target that does not count: torch's default ignore_index


@dataclass(frozen=True)
class Batch:
    """Some windows; tensors int64."""

    windows: list[int]  # the number of each within its epoch
    inputs_BT: Tensor
    targets_BT: Tensor  # IGNORE where padded
    positions_BT: Tensor

    def cut(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` windows."""
        parts = (slice(start, start + size) for start in range(0, len(self.windows), size))
        return [
            Batch(self.windows[part], self.inputs_BT[part], self.targets_BT[part], self.positions_BT[part])
            for part in parts
        ]


class Batches:
    """The batches of all steps, computed when asked for.

    Args:
        documents: indices of the training documents.
        max_length: T, places a window.
        windows_per_step: windows that a step takes, or a few fewer, over all processes.
        isolate: whether positions begin anew at each document.
        rank, world_size: this process takes every world_size-th window of a step.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Ints,
        *,
        max_length: int,
        windows_per_step: int,
        seed: int,
        isolate: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.corpus = corpus
        self.documents = documents
        self.max_length = max_length
        self.windows_per_step = windows_per_step
        self.seed = seed
        self.isolate = isolate
        self.rank = rank
        self.world_size = world_size
        self.tokens_per_epoch = int((corpus.lengths[documents] + 1).sum())
        self.num_windows = -(-self.tokens_per_epoch // max_length)
        self.steps_per_epoch = -(-self.num_windows // self.windows_per_step)
        self._epoch = -1

    def windows_at(self, step: int) -> range:
        """The windows of a step, of all processes together: windows_per_step, or a few fewer.

        An epoch's windows are shared out evenly over its steps. Filling each step but the last would leave a last one
        of hardly any windows, whose noisy gradient moves the weights as far as any other.
        """
        nth = step % self.steps_per_epoch
        return range(*(n * self.num_windows // self.steps_per_epoch for n in (nth, nth + 1)))

    def num_tokens_at(self, step: int) -> int:
        """Predicted tokens of a step, over all processes."""
        windows = self.windows_at(step)
        return min(windows.stop * self.max_length, self.tokens_per_epoch) - windows.start * self.max_length

    def num_tokens_before(self, step: int) -> int:
        """Predicted tokens of all steps before this one."""
        return step // self.steps_per_epoch * self.tokens_per_epoch + self.windows_at(step).start * self.max_length

    def batch_at(self, step: int) -> Batch:
        """The windows of this process for one step. Every process gets as many, padded where need be."""
        windows = self.windows_at(step)
        mine = np.asarray(windows[self.rank :: self.world_size], dtype=np.int64)
        largest_share = -(-len(windows) // self.world_size)
        mine = np.pad(mine, (0, largest_share - len(mine)), constant_values=self.num_windows)  # all padding
        return self._batch(step // self.steps_per_epoch, mine)

    def documents_at(self, step: int) -> list[int]:
        """The documents that the windows of a step are cut from, of all processes together."""
        order, starts = self._stream(step // self.steps_per_epoch)
        windows = self.windows_at(step)
        places = windows.start * self.max_length, min(windows.stop * self.max_length, self.tokens_per_epoch) - 1
        first, last = np.searchsorted(starts, places, side="right") - 1
        found: list[int] = order[first : last + 1].tolist()
        return found

    def _batch(self, epoch: int, windows_B: Ints) -> Batch:
        order, starts = self._stream(epoch)
        places_BT = windows_B[:, None] * self.max_length + np.arange(self.max_length)
        real_BT = places_BT < self.tokens_per_epoch
        clipped_BT = np.minimum(places_BT, self.tokens_per_epoch - 1)
        nth_BT = np.searchsorted(starts, clipped_BT, side="right") - 1
        document_BT = order[nth_BT]
        within_BT = clipped_BT - starts[nth_BT]  # 0 at the start token
        token_BT = self.corpus.offsets[document_BT] + within_BT
        last = len(self.corpus.tokens) - 1
        before_BT = self.corpus.tokens[np.clip(token_BT - 1, 0, last)].astype(np.int64)
        here_BT = self.corpus.tokens[np.clip(token_BT, 0, last)].astype(np.int64)
        is_end_BT = token_BT == self.corpus.offsets[document_BT + 1]
        inputs_BT = np.where(within_BT == 0, self.corpus.start_id, before_BT)
        targets_BT = np.where(is_end_BT, self.corpus.end_id, here_BT)
        in_window_BT = np.tile(np.arange(self.max_length), (len(windows_B), 1))
        # Padding goes on counting, so that it never looks like the start of a document.
        positions_BT = (
            np.where(real_BT, np.minimum(within_BT, in_window_BT), in_window_BT) if self.isolate else in_window_BT
        )
        return Batch(
            windows=windows_B.tolist(),
            inputs_BT=torch.from_numpy(np.where(real_BT, inputs_BT, self.corpus.end_id)),
            targets_BT=torch.from_numpy(np.where(real_BT, targets_BT, IGNORE)),
            positions_BT=torch.from_numpy(positions_BT),
        )

    def _stream(self, epoch: int) -> tuple[Ints, Ints]:
        """Documents in this epoch's order, and the place where each starts. Kept for one epoch."""
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            order = generator.permutation(self.documents)
            ends = np.cumsum(self.corpus.lengths[order] + 1)
            self._order, self._starts = order, np.concatenate([[0], ends[:-1]])
            self._epoch = epoch
        return self._order, self._starts


class _Steps(torch.utils.data.Dataset[Batch]):
    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch:
        return self.batches.batch_at(step)


def load_ahead(batches: Batches, steps: range, num_workers: int) -> Iterator[Batch]:
    """The windows of each step in order, prepared by `num_workers` processes ahead of use."""
    loader: Iterator[Batch] = iter(
        torch.utils.data.DataLoader(
            _Steps(batches),
            sampler=steps,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
        )
    )
    return loader


def _leave_signals(_worker: int) -> None:
    """A signal to the whole group is for the process that saves; workers end with it (pipeline/owner.py)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
