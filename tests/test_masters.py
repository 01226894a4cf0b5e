"""Masters: small updates are not lost, and what is saved is in full precision."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.masters import Masters


def small_model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, bos_token_id=0, eos_token_id=0))


def test_updates_too_small_for_16_bits_add_up():
    linear = torch.nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    masters = Masters(linear, torch.bfloat16)
    for _ in range(20):
        masters.matrices.flat.add_(1e-3)  # bfloat16 has nothing between 1 and 1.0078
        masters.round_into_model()
    assert linear.weight.item() == 1.0234375  # 1.02 rounded


def test_gradients_of_16_bit_weights_are_summed_in_32():
    linear = torch.nn.Linear(1, 1, bias=False)
    masters = Masters(linear, torch.bfloat16)
    (gradient, _) = masters.gradients
    for factor in (1.0, 2**-10):
        (linear.weight * factor).sum().backward()
    assert linear.weight.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert float(gradient) == 1 + 2**-10
    masters.zero_grad()
    assert float(gradient) == 0 and linear.weight.grad.data_ptr() == gradient.data_ptr()


def test_in_32_bits_nothing_is_there_twice():
    model = small_model()
    masters = Masters(model, torch.float32)
    pointers = {flat.untyped_storage().data_ptr() for flat in masters.tensors}
    assert {weight.untyped_storage().data_ptr() for weight in model.parameters()} == pointers
    masters.round_into_model()  # changes nothing


def test_the_state_dict_holds_masters_and_keeps_tied_weights_one():
    model = small_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masters = Masters(model, torch.bfloat16)
    found = masters.state_dict(model, {name: group.flat for name, group in masters.groups.items()})
    assert set(found) == set(model.state_dict())
    assert all(torch.equal(found[name], weight) for name, weight in before.items())
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
