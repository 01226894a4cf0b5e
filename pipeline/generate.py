"""Continue a prompt: one greedy continuation and several sampled ones, together, with a cache of keys and values.

Each sampled continuation draws from its own stream of random numbers, a function of (seed, prompt, its number), and
a batch holds the continuations of one prompt alone. So a prompt says the same whatever other prompts there are.

Letters of array names: R rows of a batch, S sampled ones among them, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline import stage
from pipeline.model import damaged, load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.sample import Params


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained model in float32 on the CPU, and its tokenizer.

    Raises:
        Refusal: one of them is damaged.
    """
    model = load_trained(folder)
    # A pretrained model may bring its own idea of sampling; params.yaml decides alone.
    model.generation_config = GenerationConfig()
    with stage.refused_as(partial(damaged, folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _ = tokenizer.all_special_ids  # a token that is not in the vocabulary shows only here
    return model.eval(), tokenizer


def continuations(
    model: PreTrainedModel, prompt: str, prompt_ids: list[int], num_new_tokens: int, end_id: int, params: Params
) -> list[list[int]]:
    """Token ids that follow the prompt: the greedy continuation first, then params.samples_per_prompt sampled ones.

    Args:
        model: from `load`.
        prompt: its text, of which the random numbers are a function.
        prompt_ids: its tokens, the start token among them.
        num_new_tokens: the longest continuation; one that ends earlier ends with `end_id`.
        end_id: the token after which nothing follows.
        params: how to sample.
    """
    uniforms_ST = np.array(
        [_stream(params.seed, prompt, i).random(num_new_tokens) for i in range(params.samples_per_prompt)]
    ).reshape(params.samples_per_prompt, num_new_tokens)
    rows_RT = torch.tensor([prompt_ids]).expand(1 + params.samples_per_prompt, -1)
    generated_RT = model.generate(
        rows_RT,
        attention_mask=torch.ones_like(rows_RT),
        generation_config=GenerationConfig(
            max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=end_id, pad_token_id=end_id, use_cache=True
        ),
        logits_processor=LogitsProcessorList([_Draw(torch.from_numpy(uniforms_ST), len(prompt_ids), params)]),
    )
    rows: list[list[int]] = generated_RT[:, len(prompt_ids) :].tolist()
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


class _Draw(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Leaves row 0 alone and, of every other row, only the token that its random number falls on."""

    def __init__(self, uniforms_ST: torch.Tensor, prompt_length: int, params: Params) -> None:
        self.uniforms_ST, self.prompt_length = uniforms_ST, prompt_length
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
        if params.top_k:
            self.warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(params.top_p)))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt_length
        sampled_SV = self.warpers(input_ids[1:], scores[1:])
        cumulative_SV = sampled_SV.double().softmax(-1).cumsum(-1)
        falls_S1 = self.uniforms_ST[:, position, None] * cumulative_SV[:, -1:]
        drawn_S1 = (cumulative_SV <= falls_S1).sum(-1, keepdim=True)
        only_drawn_SV = torch.full_like(sampled_SV, -torch.inf).scatter_(1, drawn_S1, 0.0)
        return torch.cat([scores[:1], only_drawn_SV])


def _stream(seed: int, prompt: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{number}\0{prompt}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
