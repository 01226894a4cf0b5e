"""What the sample stage promises: seeded, independent continuations, honest overlaps, reports that show any text."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from pipeline import generate, sample
from pipeline.corpus import Corpus
from pipeline.stage import Refusal

END = 256  # the bytes are 0 to 255
POSITIONS = 48
PARAMS = {
    "prompts": ["The old", "Once upon a time", ""],
    "max_new_tokens": 12,
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "samples_per_prompt": 2,
    "memorised_tokens": 10,
    "seed": 1,
}
# Any text, but rich in what Markdown takes for marks.
texts = st.text(st.sampled_from("*_`#>-+=1.)|[]()<>&!~:/\\ \n\t\raw;") | st.characters(exclude_categories=["Cs"]))


def params(**changes: Any) -> sample.Params:
    return sample.Params.model_validate(PARAMS | changes)


def corpus_of(documents: Sequence[Sequence[int]], end_id: int = END) -> Corpus:
    return Corpus(
        tokens=np.array([token for document in documents for token in document], dtype=np.uint16),
        offsets=np.cumsum([0, *map(len, documents)], dtype=np.int64),
        num_bytes=np.zeros(len(documents), np.int64),
        hashes=np.zeros(len(documents), np.uint64),
        vocabulary_size=END + 1,
        start_id=END,
        end_id=end_id,
    )


CORPUS = corpus_of([[1, 2, 3], [4, 5, 6, 7]])
TRAIN = np.array([0, 1])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random model with opinions: large weights make its distributions peaked."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=END + 1, n_positions=POSITIONS, n_layer=2, n_head=2, n_embd=32, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


def rows_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> list[dict[str, Any]]:
    return sample.samples(model, tokenizer, CORPUS, TRAIN, params(**changes))


def ids_of(model: PreTrainedModel, prompt_ids: list[int], end_id: int = END, **changes: Any) -> list[list[int]]:
    chosen = params(**changes)
    return generate.continuations(model, "the prompt", prompt_ids, chosen.max_new_tokens, end_id, chosen)


def test_the_greedy_continuation_is_the_likeliest_token_each_time_computed_without_a_cache(
    model: PreTrainedModel,
) -> None:
    ids = [END, 10, 20, 30]
    for _ in range(12):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids_of(model, [END, 10, 20, 30], end_id=-1)[0] == ids[4:]


def test_a_prompt_is_continued_the_same_way_whatever_other_prompts_there_are(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = rows_of(model, tokenizer)
    alone = [row for prompt in reversed(PARAMS["prompts"]) for row in rows_of(model, tokenizer, prompts=[prompt])]
    assert sorted(together, key=json.dumps) == sorted(alone, key=json.dumps)


def test_more_samples_leave_the_earlier_ones_as_they_were(model: PreTrainedModel) -> None:
    five = ids_of(model, [END, 65], samples_per_prompt=5)
    assert len(five) == 6
    for fewer in (0, 1, 3):
        assert ids_of(model, [END, 65], samples_per_prompt=fewer) == five[: fewer + 1]


def test_the_samples_of_a_prompt_differ_and_another_seed_gives_others(model: PreTrainedModel) -> None:
    greedy, *sampled = ids_of(model, [END, 65], samples_per_prompt=4)
    other_greedy, *other_sampled = ids_of(model, [END, 65], samples_per_prompt=4, seed=2)
    assert greedy == other_greedy
    assert len({tuple(ids) for ids in sampled + other_sampled}) == 8


def test_tokens_are_drawn_with_the_probabilities_that_temperature_top_k_and_top_p_leave() -> None:
    chosen = params(temperature=0.5, top_k=5, top_p=0.9)
    logits = torch.tensor([0.0, 1.0, 0.6, -0.3, 1.4, 0.9, -2.0])
    kept = torch.softmax(logits / 0.5, -1).sort(descending=True)
    expected = torch.zeros(7)
    kept_values = kept.values[:5] / kept.values[:5].sum()  # the five likeliest of all
    num_kept = int((kept_values.cumsum(-1) < 0.9).sum()) + 1  # the likeliest that reach 0.9 together
    assert num_kept < 5
    expected[kept.indices[:num_kept]] = kept_values[:num_kept] / kept_values[:num_kept].sum()

    num_draws = 4000
    evenly_spread = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    draw = generate._Draw(evenly_spread[:, None], 1, chosen)
    scores = draw(torch.zeros((num_draws + 1, 1), dtype=torch.long), logits.repeat(num_draws + 1, 1))
    assert torch.equal(scores[0], logits)  # the greedy row
    frequencies = torch.bincount(scores[1:].argmax(-1), minlength=7) / num_draws
    torch.testing.assert_close(frequencies, expected, atol=2 / num_draws, rtol=0)


def test_a_continuation_stops_at_the_end_of_text_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    endless = ids_of(model, [END, *tokenizer("The old")["input_ids"]], end_id=-1)[0]
    end_id = next(token for token in endless[3:] if token not in endless[:3])
    cut = endless[: endless.index(end_id)]
    tokens = corpus_of([[1, 2, 3]], end_id=end_id)
    row, *longer = sample.samples(model, tokenizer, tokens, TRAIN[:1], params(prompts=["The old"]))
    assert any(other["num_new_tokens"] > len(cut) for other in longer)  # those of one batch end one by one
    assert row["stopped"] == "end_of_text"
    assert row["num_new_tokens"] == len(cut)
    assert row["continuation"] == tokenizer.decode(cut)
    assert row["text"] == "The old" + row["continuation"]


def test_an_empty_prompt_starts_from_the_start_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert sample.prompt_tokens(tokenizer, "", END, POSITIONS) == [END]
    rows = rows_of(model, tokenizer, prompts=[""])
    assert len(rows) == 3
    assert all(row["text"] == row["continuation"] != "" for row in rows)


def test_the_name_of_a_control_token_in_a_prompt_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = sample.prompt_tokens(tokenizer, "a<|endoftext|>", END, POSITIONS)
    assert len(ids) == 1 + len("a<|endoftext|>")
    assert END not in ids[1:]


def test_a_continuation_ends_where_the_models_positions_do(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_of(model, tokenizer, prompts=["x" * 40], max_new_tokens=1000, temperature=9.0)
    assert [row["num_new_tokens"] for row in rows if row["stopped"] == "positions"]
    assert all(row["num_new_tokens"] <= POSITIONS - 41 for row in rows)


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows_of(model, tokenizer, prompts=["x" * (POSITIONS - 2)])
    with pytest.raises(Refusal, match=r"has 47 tokens and the model 48 positions.*46 tokens at most"):
        rows_of(model, tokenizer, prompts=["x" * (POSITIONS - 1)])


def test_only_what_a_training_document_has_verbatim_counts_as_memorised(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    greedy = ids_of(model, [END, *tokenizer("The old")["input_ids"]], samples_per_prompt=0)[0]
    assert len(greedy) == 12
    tokens = corpus_of([[7, *greedy[:10], 7], greedy])
    chosen = params(prompts=["The old"], samples_per_prompt=0)
    [row] = sample.samples(model, tokenizer, tokens, np.array([0]), chosen)
    assert row["memorised"]
    assert row["longest_overlap_num_tokens"] == 10
    assert row["longest_overlap_text"] == tokenizer.decode(greedy[:10])
    assert row["overlap_fraction"] == 10 / 12
    [row] = sample.samples(model, tokenizer, tokens, np.array([0]), params(**dict(chosen) | {"memorised_tokens": 11}))
    assert not row["memorised"]


def test_the_stage_writes_the_same_bytes_every_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / name for name in ("tokens", "split", "best", "samples.jsonl", "samples.md")}
    # What a model brings along must not decide how it is sampled.
    opinionated = copy.deepcopy(model)
    opinionated.generation_config.update(do_sample=True, repetition_penalty=5.0, max_length=3)
    opinionated.save_pretrained(paths["best"])
    tokenizer.save_pretrained(paths["best"])
    for name in ("tokens", "split"):
        paths[name].mkdir()
    CORPUS.tokens.astype("<u2").tofile(paths["tokens"] / "tokens.bin")
    for name in ("offsets", "num_bytes", "hashes"):
        np.save(paths["tokens"] / f"{name}.npy", getattr(CORPUS, name))
    about = {"vocabulary_size": END + 1, "start_id": END, "end_id": END}
    (paths["tokens"] / "tokens.json").write_text(json.dumps(about))
    np.save(paths["split"] / "train.npy", TRAIN)
    written = []
    for _ in range(2):
        torch.manual_seed(torch.seed())  # the stage has random numbers of its own
        sample.main(paths, params())
        written.append((paths["samples.jsonl"].read_bytes(), paths["samples.md"].read_bytes()))
    assert written[0] == written[1]
    rows = [json.loads(line) for line in written[0][0].decode().split("\n")[:-1]]
    assert [row["method"] for row in rows] == ["greedy", "sampled", "sampled"] * 3
    assert rows == rows_of(model, tokenizer)
    assert capsys.readouterr().out.startswith("sample: 9 continuations of 3 prompts, 0 of them memorised;")


@settings(deadline=None)  # a busy machine is no failure
@given(texts, texts)
@example("- a\n+ b\n* c", "\n1. d\n2) e")
@example("# a", "\nb\n===\nc\n---")
@example("<b>&amp;&#35;</b>", " ![a](b) [c]: d `e` \\* **f** <http://g>")
@example("> a\n\n    b", "\n\tc\n***\n~~~\nd")
def test_the_page_shows_every_text_as_it_is(prompt: str, continuation: str) -> None:
    row = {
        "prompt": prompt,
        "text": prompt + continuation,
        "method": "greedy",
        "num_new_tokens": 9,
        "stopped": "positions",
        "longest_overlap_num_tokens": 3,
        "longest_overlap_text": continuation,
        "memorised": True,
    }
    blocks = MarkdownIt("commonmark").parse(sample.page([row]))
    kinds = {child.type for block in blocks for child in block.children or [block]}
    assert kinds <= {"text", "text_special", "hardbreak", "strong_open", "strong_close"} | {
        f"{name}_{side}" for name in ("heading", "paragraph", "blockquote") for side in ("open", "close")
    }
    quote = next(i for i, block in enumerate(blocks) if block.type == "blockquote_open")
    shown = "".join(
        "\n" if child.type == "hardbreak" else child.content
        for block in blocks[quote:]
        for child in block.children or []
    )
    assert [visible(line) for line in shown.split("\n")] == (
        [visible(line) for line in (prompt + continuation).splitlines() if line.strip()] or [""]
    )


def visible(line: str) -> str:
    """Without the blanks around it; control characters as the page shows them."""
    line = line.strip().replace("\t", " ")
    return "".join("\ufffd" if category(c) == "Cc" else c for c in line).strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least 1 item"),
        ({"prompts": ["a", "b", "a"]}, "'a' is there more than once"),
        ({"prompts": [3]}, "valid string"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"top_k": -1}, "greater than or equal to 0"),
        ({"samples_per_prompt": 65}, "less than or equal to 64"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_parameters_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        params(**changes)
