import hashlib
import json
import random

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipeline import bpe, corpus, documents, files, leakage, split, tokenize
from pipeline.model import Params as ModelParams
from pipeline.sides import TRAIN, side_of
from pipeline.stage import Refusal

SCRATCH = ModelParams(base="scratch", revision=None)
LEAKAGE = leakage.Params(ngram_size=13, near_duplicate_similarity=0.8, minhash_permutations=128)
SPLIT = split.Params(validation_fraction=0.2, test_fraction=0.2, min_documents=1, leakage=LEAKAGE, seed=1)
PARAMS = tokenize.Params(vocabulary_size=400, min_frequency=2)
CONTROLS = ["<|endoftext|>", "<s>", "</s>", "<unk>", "[PAD]", "<|im_start|>", "Ġ", "Ċ"]
NASTY = st.lists(
    st.one_of(
        st.sampled_from([*CONTROLS, "\0", "\ufeff", "\u2028", "\r\n", "  ", "'s", "👨\u200d👩", "\U000e0001"]),
        st.text(),
    )
).map("".join)


def sentences(number, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=12)) for _ in range(number)]


def write_clean(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    rows = ((text, hashlib.sha256(text.encode()).hexdigest()) for text in texts)
    documents.write(folder / "documents.parquet", ("text", "sha256"), rows)


def run(folder, texts, model=SCRATCH, params=PARAMS):
    """Run the stage on these texts; the tokens and the report."""
    paths = {name: folder / name for name in ("clean", "tokens", "tokenize.json")}
    write_clean(paths["clean"], texts)
    tokenize.main(paths, model=model, split=SPLIT, tokenize=params)
    return corpus.load(paths["tokens"]), files.read_json(paths["tokenize.json"])


def side(text):
    digest = hashlib.sha256(text.encode()).hexdigest()
    return side_of(np.array([tokenize.content_hash(digest)], np.uint64), SPLIT)[0]


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def pretrained(folder, backend, **config):
    """A model folder as a user would bring it, with its tokenizer; no weights, which this stage does not read."""
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    files.write_json(folder / "config.json", {"model_type": "gpt2"})
    return ModelParams(base=str(folder), revision=files.sha256_of(folder))


def lower_casing():
    """A tokenizer that loses capitals, truncates, pads and adds control tokens unless told not to."""
    words = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", "<pad>", "a", "b", "c", "<", "s", ">"])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>", "<unk>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    backend.enable_truncation(4)
    backend.enable_padding(length=8, pad_id=3, pad_token="<pad>")
    return backend


LOWER_CASING = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A tokenizer trained by the stage, as it is loaded from its folder."""
    folder = tmp_path_factory.mktemp("scratch")
    run(folder, [*sentences(60), "a <|endoftext|> and <|endoftext|>"])
    return load(folder / "tokens" / "tokenizer")


@settings(deadline=None)
@given(texts=st.lists(NASTY.filter(bool), min_size=1, max_size=5))
def test_decoding_gives_every_kept_document_back_exactly(scratch, texts):
    tally = tokenize.Tally()
    rows = list(tokenize.encoded([(texts, ["0" * 64] * len(texts))], scratch, tally))
    assert [scratch.decode(row.tokens, clean_up_tokenization_spaces=False) for row in rows] == texts
    assert tally.documents_kept == len(texts)
    assert tally.documents_not_reversible == 0
    assert tally.num_bytes == sum(len(text.encode()) for text in texts)
    assert all(scratch.eos_token_id not in row.tokens for row in rows)


def test_the_text_of_a_control_token_in_a_document_is_text(tmp_path):
    text = "before<|endoftext|>after <|endoftext|>"
    tokens, report = run(tmp_path, [*sentences(50), text])
    assert tokens.end_id == tokens.start_id == 0
    assert tokens.end_id not in tokens.tokens
    assert report["documents_dropped"] == {"control_token": 0, "empty": 0}
    tokenizer = load(tmp_path / "tokens" / "tokenizer")
    assert tokenizer.decode(tokens.document(50)) == text
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 2  # who asks for control tokens gets them


def test_the_stage_writes_what_the_corpus_reads(tmp_path):
    texts = [*sentences(40), "grüße 你好 🎉"]
    tokens, report = run(tmp_path, texts)
    tokenizer = load(tmp_path / "tokens" / "tokenizer")
    assert [tokenizer.decode(tokens.document(index)) for index in range(tokens.num_documents)] == texts
    assert tokens.num_bytes.tolist() == [len(text.encode()) for text in texts]
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
    assert tokens.hashes.tolist() == [int.from_bytes(digest, "big") for digest in digests]
    assert tokens.tokens.dtype == np.uint16
    assert tokens.vocabulary_size == len(tokenizer) == report["vocabulary_size"] == 400
    assert report["num_tokens"] == tokens.lengths.sum()
    assert report["num_bytes"] == tokens.num_bytes.sum()


def test_the_tokenizer_learns_from_training_documents_alone(tmp_path):
    texts = sentences(200)
    train = [text for text in texts if side(text) == TRAIN]
    others = [text for text in sentences(200, seed=1) if side(text) != TRAIN]
    written = []
    for name, documents_there in {"texts": texts, "others": train + others, "train": train}.items():
        run(tmp_path / name, documents_there)
        written.append((tmp_path / name / "tokens" / "tokenizer" / "tokenizer.json").read_bytes())
    assert written[0] == written[1] == written[2]
    run(tmp_path / "less", train[1:])
    assert (tmp_path / "less" / "tokens" / "tokenizer" / "tokenizer.json").read_bytes() != written[0]


def test_without_training_documents_the_vocabulary_is_the_bytes(tmp_path):
    texts = [text for text in sentences(100) if side(text) != TRAIN]
    tokens, _ = run(tmp_path, texts)
    assert tokens.vocabulary_size == bpe.SMALLEST_VOCABULARY
    assert (tokens.lengths == tokens.num_bytes).all()


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path):
    rows = [tokenize.Encoded([70_000, 1], 3, 2**64 - 1), tokenize.Encoded([65_535], 1, 0)]
    tokenize.write_arrays(tmp_path, rows, 70_001)
    files.write_json(tmp_path / "tokens.json", {"vocabulary_size": 70_001, "start_id": 0, "end_id": 0})
    tokens = corpus.load(tmp_path)
    assert tokens.document(0).tolist() == [70_000, 1]
    assert tokens.document(1).tolist() == [65_535]
    assert tokens.hashes.tolist() == [2**64 - 1, 0]


def test_a_pretrained_tokenizer_encodes_whole_documents_without_adding_anything(tmp_path):
    model = pretrained(tmp_path / "base", lower_casing(), **LOWER_CASING)
    tokens, report = run(tmp_path, ["aaaabbbbcccc", "<s>a</s>", "AbC"], model)
    assert [tokens.document(index).tolist() for index in (0, 2)] == [[4] * 4 + [5] * 4 + [6] * 4, [4, 5, 6]]
    assert tokens.document(1).tolist() == [7, 8, 9, 4, 7, 2, 8, 9]  # the slash is unknown
    assert (tokens.start_id, tokens.end_id) == (0, 1)
    assert report["documents_kept"] == 3
    assert report["documents_not_reversible"] == 2
    assert load(tmp_path / "tokens" / "tokenizer").pad_token == "<pad>"


def test_documents_that_a_tokenizer_cannot_hold_are_dropped_by_reason(tmp_path, capsys):
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("a", -1.0),
        ("b", -1.0),
        ("<", -9.0),
        ("/", -9.0),
        ("s", -9.0),
        (">", -9.0),
    ]
    backend = Tokenizer(models.Unigram(pieces, 0))  # reads the text </s> as the piece of that name
    backend.normalizer = normalizers.Replace("b", "")
    backend.add_special_tokens(["</s>"])
    model = pretrained(tmp_path / "base", backend, eos_token="</s>")
    tokens, report = run(tmp_path, ["aa", "a</s>a", "bbb", "aaa"], model)
    assert report["documents_dropped"] == {"control_token": 1, "empty": 1}
    assert [tokens.document(index).tolist() for index in range(2)] == [[2, 2], [2, 2, 2]]
    assert tokens.start_id == tokens.end_id == 1
    assert "cannot hold 2 documents (dropped)" in capsys.readouterr().out


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    model = pretrained(tmp_path / "base", lower_casing(), bos_token="<s>")
    with pytest.raises(Refusal, match="no eos_token"):
        run(tmp_path, ["abc"], model)


def test_a_tokenizer_that_makes_nothing_of_the_text_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"</s>": 0}, "</s>"))
    backend.normalizer = normalizers.Replace("x", "")
    model = pretrained(tmp_path / "base", backend, eos_token="</s>")
    with pytest.raises(Refusal, match="made no token of 1 documents"):
        run(tmp_path, ["xxx"], model)
    assert not (tmp_path / "tokens").exists()


def test_the_tokenizer_folder_does_not_tell_where_it_came_from(tmp_path, monkeypatch):
    config = LOWER_CASING | {"model_max_length": 77, "chat_template": "{{ messages }}"}
    written = []
    for place in ("one", "the other ü"):
        run(tmp_path / place, ["abc", "ccc"], pretrained(tmp_path / place / "base", lower_casing(), **config))
        folder = tmp_path / place / "tokens"
        assert not any(str(tmp_path).encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())
        written.append(files.sha256_of(folder))
        about = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
        assert about["model_max_length"] == 77
        assert not {"is_local", "local_files_only", "name_or_path"} & set(about)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert written[0] == written[1]


def test_the_order_of_documents_does_not_change_the_tokenizer(tmp_path):
    texts = sentences(100)
    for name, some in {"one": texts, "other": texts[::-1]}.items():
        run(tmp_path / name, some)
    assert files.sha256_of(tmp_path / "one/tokens/tokenizer") == files.sha256_of(tmp_path / "other/tokens/tokenizer")


def test_the_trained_tokenizer_is_the_same_on_every_machine(tmp_path):
    run(tmp_path, sentences(100))
    assert files.sha256_of(tmp_path / "tokens")[:16] == "ace23dad5434ea30"


@pytest.mark.parametrize("wrong", [{"vocabulary_size": 256}, {"min_frequency": 0}])
def test_numbers_out_of_range_are_faults(wrong):
    with pytest.raises(pydantic.ValidationError, match="greater than or equal"):
        tokenize.Params.model_validate({"vocabulary_size": 400, "min_frequency": 2} | wrong)
