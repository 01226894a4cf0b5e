"""A model made ready for training gives the logits that it gave before, or is refused."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.dropout import Dropout, Noise
from pipeline.prepare import hidden_states, output_weights, prepare
from pipeline.stage import Refusal

SMALL = dict(vocab_size=64, bos_token_id=0, eos_token_id=0)
GPT2 = GPT2Config(n_layer=2, n_head=2, n_embd=16, **SMALL)
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **SMALL
)


@pytest.mark.parametrize(("kind", "config"), [(GPT2LMHeadModel, GPT2), (LlamaForCausalLM, LLAMA)])
def test_packed_documents_have_the_logits_that_they_had(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    tokens = torch.randint(64, (2, 12))
    positions = torch.arange(6).repeat(2, 2)
    with torch.inference_mode():
        expected = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        prepare(model, Noise())
        found = hidden_states(model, tokens, positions) @ output_weights(model).T
    assert torch.allclose(found, expected, atol=1e-6)


def test_every_dropout_becomes_ours():
    model = GPT2LMHeadModel(GPT2)
    prepare(model, Noise())
    kinds = [type(module) for module in model.modules()]
    assert torch.nn.Dropout not in kinds
    assert kinds.count(Dropout) == 1 + 3 * 2  # embeddings; attention weights, attention output and MLP of each layer


class Capped(GPT2LMHeadModel):
    """Squeezes its logits, as some models do."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits = 0.1 * outputs.logits
        return outputs


class Biased(GPT2LMHeadModel):
    """Has a bias in its output layer."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(16, 64, bias=True)


def test_a_model_with_logits_of_its_own_is_refused():
    with pytest.raises(Refusal, match="Capped makes its logits in a way of its own"):
        prepare(Capped(GPT2), Noise())
    with pytest.raises(Refusal, match="Biased has no output layer without bias"):
        prepare(Biased(GPT2), Noise())
