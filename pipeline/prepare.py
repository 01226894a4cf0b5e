"""A model made ready for training: our dropout, our attention, and the loss straight from its hidden states.

All of it gives what the model's own layers give, up to rounding, which `prepare` checks each time.

Letters of tensor names: B windows, T tokens of a window, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from pipeline import attention
from pipeline.dropout import Dropout, Noise
from pipeline.stage import Refusal


def prepare(model: PreTrainedModel, noise: Noise) -> None:
    """Exchange the layers that ours do faster, or with masks that can be repeated.

    Raises:
        Refusal: the logits are then others, so this model is built in a way that ours do not cover.
    """
    probe_BT = torch.arange(8, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    model.eval()
    with torch.inference_mode():
        expected_BTV = model(input_ids=probe_BT, use_cache=False).logits

    exchange(model, noise)
    model.eval()  # the new layers too
    with torch.inference_mode():
        found_BTV = hidden_states(model, probe_BT, None) @ output_weights(model).T
    moved = float(
        (found_BTV.nan_to_num() - expected_BTV.nan_to_num()).abs().max()
    )  # broken weights are not our concern
    if moved > 1e-3 * max(1.0, float(expected_BTV.nan_to_num().abs().max())):
        raise Refusal(
            f"model.base: {type(model).__name__} makes its logits in a way of its own (they would differ by "
            f"{moved:.3g}), such as a cap or a scale on them, which this training loop does not cover; choose another"
        )


def exchange(model: PreTrainedModel, noise: Noise) -> None:
    """What `prepare` does, unchecked."""
    for module in list(model.modules()):
        module.noise = noise  # where attention looks for it
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Dropout):
                setattr(module, name, Dropout(child.p, noise))
            elif isinstance(child, NewGELUActivation):  # the same function in one pass over memory instead of eight
                setattr(module, name, torch.nn.GELU("tanh"))
    if model.device.type == "cpu":
        attention.register()
        model.set_attn_implementation(attention.NAME)


def hidden_states(model: PreTrainedModel, inputs_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """The forward pass up to what the output layer takes, [B, T, C]."""
    outputs = model.base_model(input_ids=inputs_BT, position_ids=positions_BT, use_cache=False)
    hidden_BTC: Tensor = outputs.last_hidden_state
    return hidden_BTC


def output_weights(model: PreTrainedModel) -> Tensor:
    """Weights of the output layer, [V, C].

    Raises:
        Refusal: the model has no such layer, or one with a bias.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise Refusal(f"model.base: {type(model).__name__} has no output layer without bias; choose another")
    weights: Tensor = head.weight
    return weights
