"""The weights in float32, beside the 16-bit copies that the model computes with.

A weight of 16 bits cannot hold a small update: bfloat16 has 8 bits of precision, so adding less than 1/256 of a weight
changes nothing. So the optimizer works on float32 masters, gradients are summed in float32, and after every update the
model gets the masters rounded (Micikevicius et al., 2018, Mixed Precision Training). Where the model computes in
float32, its weights are views of the masters and nothing is there twice.

The masters of a group lie in one flat tensor, as do their gradients: clipping, updating, sharing among processes and
saving are then one operation each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Group:
    """Some weights of a model, one after the other in a flat tensor."""

    def __init__(self, weights: dict[str, torch.nn.Parameter], dtype: torch.dtype, device: torch.device) -> None:
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        self.weights = weights
        self.flat = torch.cat([torch.empty(0, device=device), *(w.detach().flatten() for w in weights.values())])
        self.flat.grad = torch.zeros_like(self.flat)
        gradients = self.views(self.flat.grad)
        for name, view in self.views(self.flat).items():
            weight = weights[name]
            weight.data = view.to(dtype)  # the view itself where dtype is float32
            weight.grad_dtype = torch.float32
            weight.grad = gradients[name]  # which loss.backward() adds to

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The part of each weight in a flat tensor, in the weight's shape."""
        parts = torch.split(flat, [weight.numel() for weight in self.weights.values()])
        return {name: part.view_as(weight) for (name, weight), part in zip(self.weights.items(), parts, strict=True)}


class Masters:
    """Takes over the weights of a model that is in float32, and makes it compute in `dtype`."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        trained = dict(model.named_parameters())
        device = next(iter(trained.values())).device
        self.matrices = Group({name: w for name, w in trained.items() if w.ndim >= 2}, dtype, device)
        self.vectors = Group({name: w for name, w in trained.items() if w.ndim < 2}, dtype, device)
        self.groups = {"matrices": self.matrices, "vectors": self.vectors}

    @property
    def tensors(self) -> list[Tensor]:
        """The flat tensors."""
        return [group.flat for group in self.groups.values()]

    @property
    def gradients(self) -> list[Tensor]:
        """The flat gradients."""
        return [gradient for flat in self.tensors if (gradient := flat.grad) is not None]

    def by_name(self, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each weight's part of the flat tensors of both groups."""
        return {name: view for key, group in self.groups.items() for name, view in group.views(flats[key]).items()}

    def state_dict(self, model: torch.nn.Module, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's state_dict with float32 weights from flat tensors; tied weights stay one tensor."""
        named = {weight.data_ptr(): name for group in self.groups.values() for name, weight in group.weights.items()}
        views = self.by_name(flats)
        return {
            key: views[named[tensor.data_ptr()]] if tensor.data_ptr() in named else tensor
            for key, tensor in model.state_dict().items()
        }

    def named_weights(self) -> dict[str, Tensor]:
        """The master of each weight."""
        return self.by_name({key: group.flat for key, group in self.groups.items()})

    def named_gradients(self) -> dict[str, Tensor]:
        """The gradient of each weight."""
        return self.by_name(dict(zip(self.groups, self.gradients, strict=True)))

    def zero_grad(self) -> None:
        """Forget the gradients; their memory stays."""
        for gradient in self.gradients:
            gradient.zero_()

    def round_into_model(self) -> None:
        """Give the model the masters' values, rounded to what it computes in."""
        for group in self.groups.values():
            for name, view in group.views(group.flat).items():
                if group.weights[name].data_ptr() != view.data_ptr():
                    group.weights[name].data.copy_(view)
