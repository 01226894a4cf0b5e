"""What a training step works on: built from the parameters, taken apart into a checkpoint and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import device, model
from pipeline.batches import Batches
from pipeline.corpus import Corpus, Ints
from pipeline.dropout import Noise
from pipeline.masters import Masters
from pipeline.prepare import prepare
from pipeline.stage import Refusal
from pipeline.train import Params


@dataclass
class Trainer:
    """Only `masters`, `model`, `optimizer`, `scaler` and numbers change, and only in the loop."""

    model: PreTrainedModel  # computes, in 16 bits where the precision says so
    masters: Masters  # its weights in float32, which the optimizer updates
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    noise: Noise  # the masks of dropout
    batches: Batches
    params: Params
    device: torch.device
    micro_batch_size: int  # windows a forward pass; halved when memory runs out
    num_updates_begun: int = 0  # by this process; to ask the optimizer would be to wait for a GPU
    num_skipped: int = 0  # steps without an update, because something was not finite
    rate_factor: float = 1.0  # below 1 after going back from something that was not finite

    @property
    def num_steps(self) -> int:
        return self.params.num_epochs * self.batches.steps_per_epoch

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied ones counted once."""
        return sum(weight.numel() for weight in self.model.parameters())


def make_trainer(place: device.Place, tokens: Corpus, documents: Ints, base: model.Params, params: Params) -> Trainer:
    """Everything as it is before the first step.

    Raises:
        Refusal: the base model cannot be loaded, or not be trained by this loop with these parameters.
    """
    device.make_deterministic()
    transformers.logging.disable_progress_bar()  # one for writing a file of a second
    noise = Noise()
    initial = model.initial_model(base, params, tokens).to(place.device)
    prepare(initial, noise)
    if params.isolate_documents:
        check_isolation(initial, tokens.vocabulary_size, place.device)
    masters = Masters(initial, device.DTYPES[place.precision])
    batches = Batches(
        tokens,
        documents,
        max_length=params.max_length,
        windows_per_step=params.batch_size * params.gradient_accumulation,
        seed=params.seed,
        isolate=params.isolate_documents,
        rank=place.rank,
        world_size=place.world_size,
    )
    return Trainer(
        model=initial,
        masters=masters,
        optimizer=make_optimizer(masters, params),
        scaler=torch.amp.GradScaler(place.device.type, enabled=place.precision == "fp16"),
        noise=noise,
        batches=batches,
        params=params,
        device=place.device,
        micro_batch_size=params.windows_at_once(place.world_size),
    )


def make_optimizer(masters: Masters, params: Params) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices only, not on biases and norms."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [masters.matrices.flat], "weight_decay": params.weight_decay},
            {"params": [masters.vectors.flat], "weight_decay": 0.0},
        ],
        lr=params.learning_rate,
        betas=(params.adam_beta1, params.adam_beta2),
        eps=params.adam_epsilon,
        fused=masters.matrices.flat.device.type in ("cpu", "cuda"),
    )
    for flat in masters.tensors:  # made here and not in the first step, where memory could run out half-way
        optimizer.state[flat] = {
            "step": torch.zeros((), device=flat.device if optimizer.defaults["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    return optimizer


def check_isolation(initial: PreTrainedModel, vocabulary_size: int, place: torch.device) -> None:
    """Put two documents into one window, change the first, and see that the second does not move.

    Raises:
        Refusal: it moves, so this model lets packed documents see each other.
    """
    tokens_BT = torch.arange(16, device=place).remainder(vocabulary_size).repeat(2, 1)
    tokens_BT[1, :8] = tokens_BT[1, :8].flip(0)
    positions_BT = torch.arange(8, device=place).repeat(2, 2)
    initial.eval()
    with torch.inference_mode():
        logits_BTV = initial(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits
    moved = float((logits_BTV[0, 8:] - logits_BTV[1, 8:]).abs().max())
    if moved > 1e-4:
        raise Refusal(
            f"train.isolate_documents: documents packed into one window see each other in {type(initial).__name__} "
            f"(a logit moved by {moved:.3g}); set it to false, or choose a model that respects position_ids"
        )


def capture(trainer: Trainer, copies: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A copy of all that the next step depends on besides its number: tensors, on the CPU, and what JSON holds.

    Args:
        copies: of an earlier call, that nobody reads any more. They are written over: blocks so large, freed and asked
            for again and again, would leave gaps in memory that cost as much as themselves.
    """
    copies = {} if copies is None else copies
    tensors, num_updates = {}, {}
    for name, group in trainer.masters.groups.items():
        moments = trainer.optimizer.state[group.flat]
        tensors[name] = group.flat
        tensors |= {f"{name}.{key}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        num_updates[name] = float(moments["step"])
    for name, tensor in tensors.items():
        copies[name] = copies[name].copy_(tensor) if name in copies else tensor.to("cpu", copy=True)
    return {name: copies[name] for name in tensors}, {
        "micro_batch_size": trainer.micro_batch_size,
        "num_skipped": trainer.num_skipped,
        "num_updates": num_updates,
        "scaler": trainer.scaler.state_dict(),
    }


def restore(trainer: Trainer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what `capture` copied."""
    for name, group in trainer.masters.groups.items():
        group.flat.copy_(tensors[name])
        moments = trainer.optimizer.state[group.flat]
        moments["step"].fill_(state["num_updates"][name])
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key].copy_(tensors[f"{name}.{key}"])
    trainer.masters.round_into_model()
    trainer.masters.zero_grad()
    trainer.scaler.load_state_dict(dict(state["scaler"]))
    trainer.micro_batch_size, trainer.num_skipped = state["micro_batch_size"], state["num_skipped"]
