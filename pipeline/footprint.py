"""The memory of a training step, from configuration and parameters alone.

The code that trains runs here too, from the model's construction to the optimizer's update, on torch's fake tensors:
they have shape, dtype and device, but no numbers and no memory. Every storage that comes and goes is counted, so
nothing in this file knows how a GPT-2 is built, and what changes in the loop changes here by itself.

Letters of tensor names: B windows, T tokens, C hidden size, N = B * T tokens, H heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.masking_utils import sdpa_mask

from pipeline import cross_entropy, losses
from pipeline.dropout import Noise
from pipeline.masters import Masters
from pipeline.prepare import exchange, hidden_states, output_weights
from pipeline.train import Params
from pipeline.trainer import make_optimizer

# What the libraries take when they first compute: threads, kernels made to measure, the allocator's reserves.
LIBRARIES = 100_000_000
COPIED = 16  # bytes a weight: masters and two moments for a checkpoint, the weights once more for a model folder


@dataclass(frozen=True)
class Footprint:
    """Bytes that training takes."""

    process: int  # interpreter, libraries, and what else is resident already
    state: int  # weights, gradients, optimizer: there all the time
    step: int  # beside them, at most, in a forward and backward pass; clipping and the update work in place
    evaluation: int  # beside the state, at most, while measuring losses
    copy: int  # of what is being written to disk meanwhile: in the machine's memory, not the GPU's

    def peak(self, kind: str) -> dict[str, int]:
        """The most bytes at a time by where they lie: `host`, and `gpu` where the device is of kind cuda."""
        on_device, host = self.state + max(self.step, self.evaluation), self.process + self.copy
        return {"gpu": on_device, "host": host} if kind == "cuda" else {"host": host + on_device}


class Rehearsal:
    """A model, its gradients and its optimizer without their memory.

    Args:
        dtype: that the model computes in.
        kind: of device, such as cpu or cuda; all but the CPU are taken to be alike.
    """

    def __init__(self, config: PreTrainedConfig, params: Params, dtype: torch.dtype, kind: str) -> None:
        # Fake tensors of a GPU need a torch that was built for it. Those of no device at all take the same way through
        # our code, which only ever asks for the CPU.
        self.device = torch.device("cpu" if kind == "cpu" else "meta")
        self.params, self.vocabulary_size = params, config.vocab_size
        self.fake, self.living = FakeTensorMode(), _Living()
        with self.fake, self.living:
            with no_init_weights(), self.device:
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                self.model.tie_weights()
            exchange(self.model, _Shapes())
            if kind != "cpu":
                AttentionInterface.register(_Fused.__name__, _attend)
                AttentionMaskInterface.register(_Fused.__name__, sdpa_mask)
                self.model.set_attn_implementation(_Fused.__name__)
            self.masters = Masters(self.model, dtype)
            self.optimizer = make_optimizer(self.masters, params)
            self.optimizer.step()  # makes its moments
        self.process = psutil.Process().memory_info().rss + LIBRARIES
        self.num_parameters = sum(weight.numel() for weight in self.model.parameters())
        self.state = self.living.now

    def footprint(self, micro_batch_size: int, max_length: int) -> Footprint:
        """What training takes with so many windows of so many tokens a forward pass."""
        return Footprint(
            process=self.process,
            state=self.state,
            step=self._beside_state(self._step, micro_batch_size, max_length),
            evaluation=self._beside_state(
                self._evaluate,
                losses.num_pieces_at_once(self.params.evaluation_batch_size, max_length, self.vocabulary_size),
                max_length,
            ),
            copy=COPIED * self.num_parameters,
        )

    def _beside_state(self, work: Callable[[Tensor], None], *shape: int) -> int:
        """The most bytes that are alive besides the state during work on tokens of this shape."""
        with self.fake, self.living:
            self.living.peak = self.living.now
            work(torch.zeros(shape, dtype=torch.int64, device=self.device))
            return self.living.peak - self.state

    def _step(self, tokens_BT: Tensor) -> None:
        self.model.train()
        hidden_BTC = hidden_states(self.model, tokens_BT, tokens_BT.clone())
        targets_N = tokens_BT.clone().flatten()
        nats = cross_entropy.nats(hidden_BTC.flatten(0, 1), output_weights(self.model), targets_N)
        del hidden_BTC  # as in the loop, where its name is taken again
        nats.backward()  # type: ignore[no-untyped-call]

    def _evaluate(self, tokens_BT: Tensor) -> None:
        self.model.eval()
        with torch.inference_mode():
            losses.nats(self.model, tokens_BT, tokens_BT.clone())


class _Living(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what comes out."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._remove, key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Shapes(Noise):
    """Masks without numbers."""

    def keep(self, shape: Sequence[int], probability: float, device: torch.device) -> tuple[Tensor, float]:
        return torch.empty(tuple(shape), dtype=torch.bool, device=device), 1 / (1 - probability)


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
