"""The base model: where pretrained weights come from, and how they are pinned.

`model.base` is `scratch`, a folder, or a Hub id. Pretrained weights are always pinned by
`model.revision`, so that DVC sees every change of them in params.yaml: by the commit of a Hub id, by
the SHA-256 of a folder. Remote code and pickled weights are never loaded, and a folder is looked through
(pipeline/foreign.py) before anything of it is.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from pipeline import files, foreign, stage
from pipeline.stage import Refusal, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.corpus import Corpus
    from pipeline.train import Params as TrainParams

SCRATCH = "scratch"
COMMIT = re.compile(r"[0-9a-f]{40}")
# What the configurations of causal language models call their dropout probabilities.
DROPOUTS = {"embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "embedding_dropout"}


class Params(stage.Params):
    """Section `model` of params.yaml."""

    base: str = pydantic.Field(min_length=1)
    revision: str | None

    @property
    def from_scratch(self) -> bool:
        """Whether the weights start random and the tokenizer is trained here."""
        return self.base == SCRATCH

    @pydantic.model_validator(mode="after")
    def _revision_fits_base(self) -> Params:
        if self.from_scratch and self.revision is not None:
            raise ValueError(f"revision {self.revision!r} has no meaning with base: scratch; set it to null")
        return self


def pretrained_source(model: Params) -> tuple[str, dict[str, object]]:
    """The name and keyword arguments that every `from_pretrained` of the base model takes.

    Raises:
        Refusal: the folder's bytes are not the pinned ones, or a Hub id has no commit.
    """
    assert not model.from_scratch
    safe: dict[str, object] = {"trust_remote_code": False}
    folder = Path(model.base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise Refusal(f"model.base: {folder} has no config.json, so it is no model folder")
        foreign.check(folder)
        found = files.sha256_of(folder)
        if model.revision != found:
            raise Refusal(
                f"model.revision is {model.revision!r}, but the files in {folder} have the SHA-256 {found}; "
                "write that one into params.yaml if these are the weights you mean"
            )
        return str(folder), safe
    if model.base.startswith((".", "/", "~")) or model.base.count("/") > 1:
        raise Refusal(f"model.base: there is no folder {model.base}")
    if model.revision is None or not COMMIT.fullmatch(model.revision):
        raise Refusal(
            f"model.revision is {model.revision!r}: pin {model.base} to a commit of 40 digits (on the Hub: "
            "the model's page, Files, History), or set model.base to a local folder"
        )
    _reach_hub(model)
    return model.base, safe | {"revision": model.revision}


def load_tokenizer(model: Params) -> PreTrainedTokenizerBase:
    """The fast tokenizer of the pretrained base model.

    Raises:
        Refusal: the base cannot be reached or has no fast tokenizer.
    """
    from transformers import AutoTokenizer

    name, options = pretrained_source(model)
    with stage.refused_as(partial(_unreachable, model)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, use_fast=True, **options)
        _ = tokenizer.all_special_ids  # a token that is not in the vocabulary shows only here
    if not tokenizer.is_fast:
        raise Refusal(f"model.base: {model.base} has no fast tokenizer (tokenizer.json); choose another model")
    return tokenizer


def load_pretrained(model: Params, **options: object) -> PreTrainedModel:
    """The pretrained base model, in float32, from safetensors.

    Raises:
        Refusal: the base cannot be reached or is no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, safe = pretrained_source(model)
    with stage.refused_as(partial(_unreachable, model)):
        if Path(name).is_dir():
            foreign.check_size(AutoConfig.from_pretrained(name, **safe), Path(name))
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, **safe, **options
        )
    return loaded


def _reach_hub(model: Params) -> None:
    """Say at once that the Hub cannot be reached, where `from_pretrained` would try again for a minute."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    if constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:
        pass  # an answer, so it is there
    except URLError as problem:
        raise _unreachable(model, OSError(f"{constants.ENDPOINT} cannot be reached ({problem.reason})")) from None


def _unreachable(model: Params, problem: BaseException) -> Refusal:
    if Path(model.base).is_dir():
        return Refusal(
            f"model.base: {model.base} could not be loaded: {reason(problem)}; mend it, or take another model"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return Refusal(
        f"model.base: {model.base} could not be loaded{offline}: {reason(problem)}. "
        "Without a network, download the model elsewhere, copy its folder here and set model.base to that folder."
    )


def initial_config(
    model: Params, train: TrainParams, vocabulary_size: int, start_id: int, end_id: int
) -> PreTrainedConfig:
    """The shape of the model that training starts from.

    Raises:
        Refusal: the windows are longer than the model's positions, or the tokenizer has ids that the model has not.
    """
    from transformers import AutoConfig, GPT2Config

    if model.from_scratch:
        shape = train.scratch
        return GPT2Config(
            vocab_size=vocabulary_size,
            n_positions=train.max_length,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_embd=shape.embedding_size,
            bos_token_id=start_id,
            eos_token_id=end_id,
            **{key: train.dropout for key in ("embd_pdrop", "resid_pdrop", "attn_pdrop")},
        )
    name, options = pretrained_source(model)
    with stage.refused_as(partial(_unreachable, model)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **options)
    for key in DROPOUTS & set(config.to_dict()):
        setattr(config, key, train.dropout)
    positions = num_positions(config)
    if train.max_length > positions:
        raise Refusal(f"train.max_length is {train.max_length}, but {model.base} has {positions} positions; lower it")
    if vocabulary_size > config.vocab_size:
        raise Refusal(
            f"the tokenizer has {vocabulary_size} tokens, but {model.base} only {config.vocab_size}: "
            "model and tokenizer do not belong together"
        )
    return config


def initial_model(model: Params, train: TrainParams, corpus: Corpus) -> PreTrainedModel:
    """The weights that training starts from, in float32 on the CPU: random by the seed, or the pretrained ones.

    Raises:
        Refusal: as `initial_config`.
    """
    import torch
    from transformers import GPT2LMHeadModel

    config = initial_config(model, train, corpus.vocabulary_size, corpus.start_id, corpus.end_id)
    if model.from_scratch:
        torch.manual_seed(train.seed)
        return GPT2LMHeadModel(config)
    return load_pretrained(model, config=config)


def num_positions(config: PreTrainedConfig) -> int:
    """Tokens that a model can look at together; as good as endless for models without position embeddings."""
    return int(getattr(config, "max_position_embeddings", 10**30))  # transformers' own number for "no limit"


def load_trained(folder: Path) -> PreTrainedModel:
    """A model that the train stage wrote, in float32 on the CPU.

    Raises:
        Refusal: the folder is damaged, or somebody else wrote it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()  # one for reading a file of a second
    foreign.check(folder)
    safe = {"local_files_only": True, "trust_remote_code": False}
    with stage.refused_as(partial(damaged, folder)):
        foreign.check_size(AutoConfig.from_pretrained(folder, **safe), folder)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **safe
        )
    return loaded


def damaged(folder: Path, problem: BaseException) -> Refusal:
    """What to say of a trained model that cannot be loaded."""
    return Refusal(f"{folder} is damaged ({reason(problem)}); restore it with `dvc checkout --force {folder}`")
