"""The training loop: what happens in one step, and one step after another.

The guide (docs/guide.md) explains these lines in these words. Shapes: B windows of a micro-batch, T tokens of a
window, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import cross_entropy
from pipeline.batches import Batch, load_ahead
from pipeline.device import sum_over_processes
from pipeline.prepare import hidden_states, output_weights
from pipeline.stage import Refusal
from pipeline.train import Params
from pipeline.trainer import Trainer


class NonFinite(Refusal):
    """The loss or the gradient of a step is not a finite number. The weights are as they were before the step."""

    def __init__(self, step: int, loss: float, grad_norm: float, params: Params) -> None:
        self.step, self.loss, self.grad_norm = step, loss, grad_norm
        super().__init__(
            f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}; stopped before the update. "
            f"Lower train.learning_rate (now {params.learning_rate:g}), look for broken text in the data, "
            "or try another train.mixed_precision. See docs/guide.md#non_finite"
        )


@dataclass(frozen=True)
class Step:
    """What one optimizer step gave."""

    step: int  # steps done, this one included
    loss: float | None  # mean cross-entropy of the step's batch, nats per predicted token; None: skipped, not finite
    learning_rate: float
    grad_norm: float | None  # before clipping; None: not finite, so there was no update
    num_tokens: int  # predicted tokens so far
    micro_batch_size: int  # windows a forward pass


def train_steps(trainer: Trainer, first: int) -> Iterator[Step]:
    """Train, a step at a time, from step `first` (0: the beginning) to the last.

    Raises:
        NonFinite: and train.non_finite is not `skip`, or it has skipped as many steps as it may.
    """
    steps = range(first, trainer.num_steps)
    for step, batch in zip(steps, load_ahead(trainer.batches, steps, trainer.params.num_workers), strict=True):
        try:
            done = within_memory(trainer, step, batch)
        except NonFinite:
            if trainer.params.non_finite != "skip" or trainer.num_skipped == trainer.params.max_non_finite:
                raise
            trainer.num_skipped += 1
            trainer.masters.zero_grad()
            num_tokens = trainer.batches.num_tokens_before(step + 1)
            done = Step(step + 1, None, 0.0, None, num_tokens, trainer.micro_batch_size)
        yield done


def train_step(trainer: Trainer, step: int, batch: Batch) -> Step:
    """One optimizer step: forward, loss, backward for every micro-batch, then clip, update, reset.

    The loss is the sum over all targets of the step divided by their number, whatever the number of micro-batches or
    processes, and also where the last step of an epoch is smaller.

    Raises:
        NonFinite: the loss or the gradient is not a finite number; the weights are as before the step.
    """
    params, device, batches = trainer.params, trainer.device, trainer.batches
    num_targets = batches.num_tokens_at(step)  # over all micro-batches and processes
    learning_rate = learning_rate_at(step, trainer.num_steps, params) * trainer.rate_factor
    loss_sum = torch.zeros((), device=device)

    trainer.model.train()
    for micro_batch in batch.cut(trainer.micro_batch_size):
        # Dropout is a function of (seed, step, window), so that a resumed run repeats it.
        trainer.noise.begin(micro_batch.windows, params.seed, step)
        torch.manual_seed(_seed(params.seed, step, *micro_batch.windows))  # for models that draw by themselves

        # 1. Get the data
        inputs_BT = micro_batch.inputs_BT.to(device, non_blocking=True)
        targets_BT = micro_batch.targets_BT.to(device, non_blocking=True)
        positions_BT = micro_batch.positions_BT.to(device, non_blocking=True)

        # 2. Forward pass: the model turns every token into what it expects to follow
        hidden_BTC = hidden_states(trainer.model, inputs_BT, positions_BT)

        # 3. Loss: how wrong the predictions were
        nats = cross_entropy.nats(hidden_BTC.flatten(0, 1), output_weights(trainer.model), targets_BT.flatten())
        loss = nats / num_targets
        loss_sum += loss.detach()

        # 4. Backward pass: how each weight contributed; gradients accumulate over the micro-batches, in float32
        trainer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    # Is the gradient sound, and how long is it?
    sum_over_processes(loss_sum, *trainer.masters.gradients)
    trainer.scaler.unscale_(trainer.optimizer)
    grad_norm = torch.nn.utils.get_total_norm(trainer.masters.gradients)
    # The only wait for the device; with fp16 the scaler's questions are others.
    loss_of_step, norm_of_step = torch.stack([loss_sum, grad_norm]).tolist()
    # With fp16 an infinite gradient is ordinary: the scaler skips the update and lowers its scale, until there is none.
    overflowed = trainer.scaler.is_enabled() and trainer.scaler.get_scale() >= 1
    if not math.isfinite(loss_of_step) or not (math.isfinite(norm_of_step) or overflowed):
        trainer.scaler.update()  # it must not think that it is in the middle of a step
        raise NonFinite(step, loss_of_step, norm_of_step, params)

    # Clip: a gradient longer than max_grad_norm is scaled down to it
    torch.nn.utils.clip_grads_with_norm_(trainer.masters.tensors, params.max_grad_norm, grad_norm)

    # 5. Update the weights, in float32
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate
    trainer.num_updates_begun += 1
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.masters.round_into_model()

    # 6. Reset the gradients for the next step
    trainer.masters.zero_grad()

    return Step(
        step=step + 1,
        loss=loss_of_step,
        learning_rate=learning_rate,
        grad_norm=norm_of_step if math.isfinite(norm_of_step) else None,
        num_tokens=batches.num_tokens_before(step + 1),
        micro_batch_size=trainer.micro_batch_size,
    )


def within_memory(trainer: Trainer, step: int, batch: Batch) -> Step:
    """One step, tried again with micro-batches half as large when memory runs out.

    The windows of the step stay the same, so its loss does, up to rounding.

    Raises:
        Refusal: memory does not suffice for a single window, or one of several processes ran out of it.
    """
    while True:
        num_updates_begun = trainer.num_updates_begun
        try:
            return train_step(trainer, step, batch)
        except (MemoryError, RuntimeError) as problem:
            if not is_out_of_memory(problem) or trainer.num_updates_begun != num_updates_begun:
                raise
            size = trainer.micro_batch_size
        # Outside of `except`: there the traceback would keep the tensors of the failed pass alive.
        if size == 1 or trainer.batches.world_size > 1:
            raise Refusal(
                f"out of memory at step {step + 1} with {size} x {trainer.params.max_length} tokens a forward pass: "
                "lower train.max_length, train.micro_batch_size or the size of the model; "
                "`python -m pipeline.memory` shows what fits"
            )
        trainer.masters.zero_grad()
        state = trainer.scaler.state_dict()
        trainer.scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.scaler.is_enabled())
        trainer.scaler.load_state_dict(state)  # the one before may think that it is in the middle of a step
        torch.cuda.empty_cache()
        trainer.micro_batch_size = max(1, min(size, len(batch.windows)) // 2)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch has a class of its own for GPUs alone."""
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(problem)


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


def _seed(*parts: int) -> int:
    """One 64-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
