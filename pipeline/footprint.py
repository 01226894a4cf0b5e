"""The memory of a training step, from configuration and parameters alone.

The code that trains runs here too, on torch's meta tensors, which have shapes but no numbers and no memory. Every
storage that comes and goes is noted, so nothing in this file knows how a GPT-2 is built, and what changes there or in
the pieces that training is made of changes here by itself.

Letters of tensor names: B windows, T tokens of a window, C hidden size, N tokens, H heads, D head size.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.masking_utils import sdpa_mask

from pipeline import attention, cross_entropy, losses
from pipeline.dropout import Noise, empty_mask
from pipeline.masters import Masters
from pipeline.prepare import exchange, hidden_states, output_weights
from pipeline.train import Params

# What the libraries take when they first compute: threads, kernels made to measure.
LIBRARIES = 100_000_000
ASKING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.item}  # what a number is
WEIGHT = 4  # bytes of one in float32
# Of the C allocator, in bytes: what torch aligns large blocks to and others, from where on a block is large, and what
# is too small to matter.
PAGE, LINE, LARGE, SMALL = 4096, 64, 2**21, 1024


@dataclass(frozen=True)
class Footprint:
    """Bytes that training takes."""

    process: int  # interpreter, libraries, and what else is resident already
    state: int  # weights, gradients, optimizer: there all the time
    work: int  # beside them, at most: activations and logits of a micro-batch, or of an evaluation
    copy: int  # of what is being written to disk meanwhile: in the machine's memory, not the GPU's
    gaps: int  # between the blocks of the C allocator

    def peak(self, kind: str) -> dict[str, int]:
        """The most bytes at a time by where they lie: `host`, and `gpu` where the device is of kind cuda."""
        on_device, host = self.state + self.work, self.process + self.copy
        return {"gpu": on_device, "host": host} if kind == "cuda" else {"host": host + on_device + self.gaps}


class Rehearsal:
    """A model, its gradients and its optimizer without their memory.

    Args:
        dtype: that the model computes in.
        kind: of device, such as cpu or cuda; all but the CPU are taken to be alike.
    """

    def __init__(self, config: PreTrainedConfig, params: Params, dtype: torch.dtype, kind: str) -> None:
        self.kind, self.params, self.vocabulary_size = kind, params, config.vocab_size
        self.process = psutil.Process().memory_info().rss + LIBRARIES
        self.recorder = _Recorder()
        self.built = self._record(lambda: self._build(config, dtype))
        self.num_parameters = sum(flat.numel() for flat in self.masters.tensors)
        self.evaluated: dict[int, Trace] = {}

    def footprint(self, micro_batch_size: int, max_length: int) -> Footprint:
        """What training takes with so many windows of so many tokens a forward pass."""
        if max_length not in self.evaluated:
            most = self.params.evaluation_batch_size
            size = losses.num_pieces_at_once(most, max_length, self.vocabulary_size)
            self.evaluated[max_length] = self._record(lambda: self._evaluate(size, max_length))
        evaluation = self.evaluated[max_length]
        step = self._record(lambda: self._step(micro_batch_size, max_length))
        flats = [WEIGHT * flat.numel() for flat in self.masters.tensors]
        moments = [(("moment", number), size) for number, size in enumerate(2 * flats)]
        copies = [(("copy", number), size) for number, size in enumerate(3 * flats)]
        state, work = _alive([*self.built, *moments])[-1], max(*_alive(evaluation), *_alive(step))
        copied = 3 * WEIGHT * self.num_parameters
        # Two samples are measured before a step, after it, and then a step comes while everything is written.
        run = [*self.built, *moments, *(2 * evaluation), *step, *(2 * evaluation), *copies, *step]
        return Footprint(
            process=self.process,
            state=state,
            work=work,
            copy=copied + WEIGHT * self.num_parameters,  # the best model's weights once more, when it is written
            gaps=max(0, _Heap().high_water_mark(run) - state - work - copied) if self.kind == "cpu" else 0,
        )

    def _record(self, work: Callable[[], None]) -> Trace:
        self.recorder.trace = []
        with self.recorder, torch.device("meta"):
            work()
        return self.recorder.trace

    def _build(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        with no_init_weights():
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            self.model.tie_weights()
        exchange(self.model, _Shapes())
        attention.register()
        AttentionInterface.register(_Fused.__name__, _attend)
        AttentionMaskInterface.register(_Fused.__name__, sdpa_mask)
        self.model.set_attn_implementation(attention.NAME if self.kind == "cpu" else _Fused.__name__)
        self.masters = Masters(self.model, dtype)

    def _step(self, *shape: int) -> None:
        """Forward and backward pass; clipping and the update work in place."""
        self.model.train()
        hidden_BTC = hidden_states(self.model, torch.zeros(shape, dtype=torch.int64), None)
        targets_N = torch.zeros(shape, dtype=torch.int64).flatten()
        nats = cross_entropy.nats(
            hidden_BTC.flatten(0, 1),
            output_weights(self.model),
            targets_N,
            cross_entropy.NUM_ROWS if self.kind == "cpu" else None,
        )
        nats.backward()  # type: ignore[no-untyped-call]

    def _evaluate(self, *shape: int) -> None:
        self.model.eval()
        with torch.no_grad():  # in inference mode the parts of some operations would not be seen
            losses.nats(self.model, torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))


# Storages in the order of events: something that stands for each, and its bytes, or 0 when it is freed.
Trace = list[tuple[object, int]]


def _alive(trace: Trace) -> list[int]:
    """Bytes alive after each event."""
    sizes: dict[object, int] = {}
    now, found = 0, []
    for key, size in trace:
        now += size or -sizes.pop(key)
        if size:
            sizes[key] = size
        found.append(now)
    return found


class _Recorder(TorchDispatchMode):
    """Notes when operations under it make storages, and when these are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace: Trace = []
        self._alive: set[object] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what comes out."""
        if func.overloadpacket in ASKING:
            return False  # transformers asks whether windows are without borders of documents
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive and storage.nbytes():
                    self._alive.add(storage._cdata)
                    self.trace.append((storage._cdata, storage.nbytes()))
                    weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: object) -> None:
        self._alive.remove(key)
        self.trace.append((key, 0))


class _Heap:
    """The C allocator as the launcher sets it up: everything from one heap, which never shrinks.

    As in glibc a block goes into the smallest gap that holds it, and gaps that meet become one. Two things cost space:
    a gap must be larger than the block, by its alignment; and small objects, which are not followed here, sooner or
    later lie at the end of the heap, so that it grows by whole blocks.
    """

    def __init__(self) -> None:
        self._gaps: list[tuple[int, int]] = []  # start and size, ascending
        self._blocks: dict[object, tuple[int, int]] = {}
        self._end = 0

    def high_water_mark(self, trace: Trace) -> int:
        """Bytes of the heap after these events."""
        for key, size in trace:
            if size >= SMALL:
                self._blocks[key] = self._take(size)
            elif not size and key in self._blocks:
                self._give(*self._blocks.pop(key))
        return self._end

    def _take(self, size: int) -> tuple[int, int]:
        needed = size + (PAGE if size >= LARGE else LINE)
        nth = min(
            (n for n, gap in enumerate(self._gaps) if gap[1] >= needed), key=lambda n: self._gaps[n][1], default=-1
        )
        if nth < 0:
            self._end += size
            return self._end - size, size
        start, free = self._gaps[nth]
        self._gaps[nth] = start + size, free - size
        return start, size

    def _give(self, start: int, size: int) -> None:
        n = bisect.bisect(self._gaps, (start, 0))
        if n < len(self._gaps) and self._gaps[n][0] == start + size:
            size += self._gaps.pop(n)[1]
        if n and sum(self._gaps[n - 1]) == start:
            start, before = self._gaps.pop(n - 1)
            n, size = n - 1, size + before
        self._gaps.insert(n, (start, size))


class _Shapes(Noise):
    """Masks without numbers."""

    def keep(self, x: Tensor, probability: float) -> tuple[Tensor, float]:
        return empty_mask(x), 1 / (1 - probability)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_options: Any
) -> tuple[Tensor, None]:
    """Attention of a GPU, in the form in which transformers calls it."""
    out_BHTD: Tensor = _Fused.apply(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
    return out_BHTD.transpose(1, 2), None


class _Fused(torch.autograd.Function):
    """What torch's fused attention keeps for the backward pass: never the square of scores, but the mask in numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out_BHTD = torch.empty_like(query)
        log_sums_BHT = query.new_empty(query.shape[:3], dtype=torch.float32)
        masks = [] if mask is None else [mask.to(query.dtype)]
        ctx.save_for_backward(query, key, value, out_BHTD, log_sums_BHT, *masks)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
