"""sample: the prompts of params.yaml continued by the trained model, and how much of that it knows by heart.

In:  models/best, and the training documents to compare with.
Out: samples.jsonl, a continuation a line with its longest verbatim overlap with one training document, and samples.md,
     the same for reading.

    python -m pipeline.sample
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
from pydantic import Field

from pipeline import corpus, files, markdown, stage
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.corpus import Corpus, Ints


Row = dict[str, Any]  # of samples.jsonl


class Params(stage.Params):
    """Section `sample` of params.yaml; its comments there say what each means."""

    prompts: list[str] = Field(min_length=1)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    top_k: int = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    samples_per_prompt: int = Field(ge=0, le=64)
    memorised_tokens: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**32)

    @pydantic.field_validator("prompts")
    @classmethod
    def _prompts_differ(cls, prompts: list[str]) -> list[str]:
        repeated = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
        if repeated:
            raise ValueError(f"{repeated[0]!r} is there more than once and would be continued the same way each time")
        return prompts


def main(paths: stage.Paths, sample: Params) -> None:
    """Continue every prompt, measure the overlaps, write both reports."""
    from pipeline import generate

    tokens = corpus.load(paths["tokens"])
    train_documents = corpus.read_side(paths["split"], "train", tokens.num_documents)
    model, tokenizer = generate.load(paths["best"])
    rows = samples(model, tokenizer, tokens, train_documents, sample)
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) for row in rows]
    files.write_text(paths["samples.jsonl"], "".join(f"{line}\n" for line in lines))
    files.write_text(paths["samples.md"], page(rows))
    num_memorised = sum(row["memorised"] for row in rows)
    longest = max(row["longest_overlap_num_tokens"] for row in rows)
    print(
        f"sample: {len(rows)} continuations of {len(sample.prompts)} prompts, {num_memorised} of them memorised; "
        f"the longest verbatim overlap with a training document has {longest} tokens"
    )


def samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Corpus,
    train_documents: Ints,
    params: Params,
) -> list[Row]:
    """The rows of samples.jsonl: of every prompt the greedy continuation, then the sampled ones.

    Raises:
        Refusal: a prompt leaves no room for a continuation.
    """
    from pipeline import generate, overlap

    positions = getattr(model.config, "max_position_embeddings", None)  # some models have no limit
    prompts = {prompt: prompt_tokens(tokenizer, prompt, tokens.start_id, positions) for prompt in params.prompts}
    rows: list[Row] = []
    continuations: list[Ints] = []
    for prompt, prompt_ids in prompts.items():
        room, limit = params.max_new_tokens, "max_new_tokens"
        if positions is not None and positions - len(prompt_ids) < room:
            room, limit = positions - len(prompt_ids), "positions"
        for number, ids in enumerate(generate.continuations(model, prompt, prompt_ids, room, tokens.end_id, params)):
            ended = ids[-1] == tokens.end_id
            new_ids = ids[:-1] if ended else ids
            continuation = _decode_after(tokenizer, prompt_ids[1:], new_ids)
            continuations.append(np.array(new_ids, dtype=np.int64))
            rows.append(
                {
                    "prompt": prompt,
                    "continuation": continuation,
                    "text": prompt + continuation,
                    "method": "sampled" if number else "greedy",
                    "num_new_tokens": len(new_ids),
                    "stopped": "end_of_text" if ended else limit,
                }
            )
    overlaps = overlap.longest_overlaps(continuations, tokens, train_documents)
    for row, ids_T, found in zip(rows, continuations, overlaps, strict=True):
        run = ids_T[found.start : found.start + found.num_tokens].tolist()
        row["longest_overlap_num_tokens"] = found.num_tokens
        row["longest_overlap_text"] = _decode(tokenizer, run)
        row["overlap_fraction"] = found.num_tokens / max(1, len(ids_T))
        row["memorised"] = found.num_tokens >= params.memorised_tokens
    return rows


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, start_id: int, positions: int | None) -> list[int]:
    """The start token, as every training document has it, and the prompt's tokens; its text is never a control token.

    Raises:
        Refusal: the model has no position left for a new token.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if positions is not None and 1 + len(ids) >= positions:
        raise Refusal(
            f"sample.prompts: {prompt[:40]!r}... has {len(ids):,} tokens and the model {positions:,} positions: after "
            f"the start token nothing is left for a continuation; shorten it to {positions - 2:,} tokens at most"
        )
    return [start_id, *ids]


def page(rows: list[Row]) -> str:
    """samples.md: the rows for reading, prompt by prompt."""
    lines = ["# Samples", "", "Each quote is a prompt and what the model made of it."]
    for prompt, group in itertools.groupby(rows, key=lambda row: row["prompt"]):
        lines += ["", f"## {_quoted(prompt) if prompt.strip() else '(no prompt)'}"]
        for row in group:
            overlap = (
                f"{row['longest_overlap_num_tokens']} of {row['num_new_tokens']} tokens verbatim in a training document"
            )
            run = f" ({_quoted(row['longest_overlap_text'])})" if row["longest_overlap_text"].strip() else ""
            memorised = ", **memorised**" if row["memorised"] else ""
            lines += ["", f"{row['method']}, stopped by {row['stopped']}, {overlap}{run}{memorised}:", ""]
            lines += [f"> {line}" for line in _markdown_lines(row["text"])]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"“{' '.join(markdown.escaped(line) for line in text.splitlines())}”"


def _markdown_lines(text: str) -> list[str]:
    """The text's lines that are not blank, a hard break after each but the last."""
    lines = [markdown.escaped(line.strip()) for line in text.splitlines() if line.strip()] or [" "]
    return [line + "\\" for line in lines[:-1]] + lines[-1:]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _decode_after(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text of the new tokens after the prompt's: some tokenizers drop a space at the beginning of a text."""
    prompt, whole = _decode(tokenizer, prompt_ids), _decode(tokenizer, prompt_ids + new_ids)
    return whole[len(prompt) :] if whole.startswith(prompt) else _decode(tokenizer, new_ids)


if __name__ == "__main__":
    stage.run("sample", main)
