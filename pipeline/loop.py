"""The training loop: what happens in one step, and one step after another.

The guide (docs/guide.md) explains these lines in these words. Shapes: B windows of a micro-batch, T tokens of a
window, V tokens of the vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from pipeline.batches import IGNORE, Batch, Batches, load_ahead
from pipeline.device import Autocast, sum_over_processes
from pipeline.stage import Refusal
from pipeline.train import Params


@dataclass
class Trainer:
    """What a step works on. Only `model`, `optimizer` and `scaler` change, and only in `train_step`."""

    model: PreTrainedModel
    engine: torch.nn.Module  # the model itself, or the same wrapped for several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    batches: Batches
    params: Params
    device: torch.device
    autocast: Autocast

    @property
    def num_steps(self) -> int:
        return self.params.num_epochs * self.batches.steps_per_epoch


@dataclass(frozen=True)
class Step:
    """What one optimizer step gave."""

    step: int  # steps done, this one included
    loss: float  # mean cross-entropy of the step's batch, nats per predicted token
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # predicted tokens so far


def train_steps(trainer: Trainer, first: int) -> Iterator[Step]:
    """Train, a step at a time, from step `first` (0: the beginning) to the last."""
    steps = range(first, trainer.num_steps)
    for step, micro_batches in zip(steps, load_ahead(trainer.batches, steps, trainer.params.num_workers), strict=True):
        yield train_step(trainer, step, micro_batches)


def train_step(trainer: Trainer, step: int, micro_batches: list[Batch]) -> Step:
    """One optimizer step: forward, loss, backward for every micro-batch, then clip, update, reset.

    The loss is the sum over all targets of the step divided by their number, whatever the number of micro-batches or
    processes, and also where the last step of an epoch is smaller.

    Raises:
        Refusal: the loss or the gradient is not a finite number; the weights are as before the step.
    """
    params, device, batches = trainer.params, trainer.device, trainer.batches
    num_targets = batches.num_tokens_at(step)  # over all micro-batches and processes
    learning_rate = learning_rate_at(step, trainer.num_steps, params)
    loss_sum = torch.zeros((), device=device)

    trainer.engine.train()
    for number, batch in enumerate(micro_batches):
        # Dropout is a function of (seed, step, micro-batch, process), so that a resumed run repeats it.
        torch.manual_seed(_seed(params.seed, step, number, batches.rank))

        # 1. Get the data
        inputs_BT = batch.inputs_BT.to(device, non_blocking=True)
        targets_BT = batch.targets_BT.to(device, non_blocking=True)
        positions_BT = batch.positions_BT.to(device, non_blocking=True)

        # 2. Forward pass: the model predicts every next token
        with trainer.autocast():
            logits_BTV = trainer.engine(input_ids=inputs_BT, position_ids=positions_BT, use_cache=False).logits

        # 3. Loss: how wrong the predictions were
        nats = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        loss = nats / num_targets
        loss_sum += loss.detach()

        # 4. Backward pass: how each weight contributed; gradients accumulate over the micro-batches
        with _gradients_shared(trainer, last=number == len(micro_batches) - 1):
            # Several processes average their gradients, but the loss is a sum over them.
            trainer.scaler.scale(loss * batches.world_size).backward()  # type: ignore[no-untyped-call]

    # Clip: a gradient longer than max_grad_norm is scaled down to it
    trainer.scaler.unscale_(trainer.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), params.max_grad_norm)
    (loss_of_step,) = sum_over_processes(float(loss_sum))
    _refuse_non_finite(trainer, step, loss_of_step, float(grad_norm))

    # 5. Update the weights
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()

    # 6. Reset the gradients for the next step
    trainer.optimizer.zero_grad(set_to_none=True)

    return Step(
        step=step + 1,
        loss=loss_of_step,
        learning_rate=learning_rate,
        grad_norm=float(grad_norm),
        num_tokens=batches.num_tokens_before(step + 1),
    )


def learning_rate_at(step: int, num_steps: int, params: Params) -> float:
    """Linear warmup to the peak, then linear or cosine decay towards zero.

    As in transformers' get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup, but the first step already
    moves (at peak / warmup steps), and no step has rate zero.
    """
    warmup_steps = math.ceil(params.warmup_ratio * num_steps)
    if step < warmup_steps:
        return params.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    share = 1 - progress if params.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return params.learning_rate * share


def make_optimizer(model: torch.nn.Module, params: Params) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices only, not on biases and norms."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=params.learning_rate,
        betas=(params.adam_beta1, params.adam_beta2),
        eps=params.adam_epsilon,
        fused=trained[0].device.type in ("cpu", "cuda"),
    )


def check_isolation(model: PreTrainedModel, vocabulary_size: int, device: torch.device) -> None:
    """Put two documents into one window, change the first, and see that the second does not move.

    Raises:
        Refusal: it moves, so this model lets packed documents see each other.
    """
    tokens_BT = torch.arange(16, device=device).remainder(vocabulary_size).repeat(2, 1)
    tokens_BT[1, :8] = tokens_BT[1, :8].flip(0)
    positions_BT = torch.arange(8, device=device).repeat(2, 2)
    model.eval()
    with torch.inference_mode():
        logits_BTV = model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits
    moved = float((logits_BTV[0, 8:] - logits_BTV[1, 8:]).abs().max())
    if moved > 1e-4:
        raise Refusal(
            f"train.isolate_documents: documents packed into one window see each other in {type(model).__name__} "
            f"(a logit moved by {moved:.3g}); set it to false, or choose a model that respects position_ids"
        )


def _gradients_shared(trainer: Trainer, last: bool) -> contextlib.AbstractContextManager[None]:
    """With several processes, gradients are exchanged once a step: in the last backward pass."""
    if isinstance(trainer.engine, DistributedDataParallel) and not last:
        return trainer.engine.no_sync()
    return contextlib.nullcontext()


def _refuse_non_finite(trainer: Trainer, step: int, loss: float, grad_norm: float) -> None:
    # With fp16 an infinite gradient is ordinary: the scaler skips the update and lowers its scale.
    if math.isfinite(loss) and (math.isfinite(grad_norm) or trainer.scaler.is_enabled()):
        return
    raise Refusal(
        f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}; stopped before the update. "
        f"Lower train.learning_rate (now {trainer.params.learning_rate:g}), look for broken text in the data, "
        "or try another train.mixed_precision. See docs/guide.md#non_finite"
    )


def _seed(*parts: int) -> int:
    """One 64-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
