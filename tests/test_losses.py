import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pipeline import losses, model
from pipeline.corpus import Corpus
from tests import tiny

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def corpus_of(lengths: list[int], seed: int = 0) -> Corpus:
    random = np.random.default_rng(seed)
    return Corpus(
        tokens=random.integers(0, tiny.END_ID, sum(lengths)).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_bytes=np.asarray(lengths, np.int64),
        hashes=random.integers(0, 2**63, len(lengths)).astype(np.uint64),
        vocabulary_size=tiny.VOCABULARY_SIZE,
        start_id=tiny.END_ID,
        end_id=tiny.END_ID,
    )


def gpt2(tokens: Corpus, **changes: object) -> PreTrainedModel:
    """A tiny GPT-2 with sharp opinions, so that a wrong context shows."""
    made = model.initial_model(model.Params(base="scratch", revision=None), tiny.params(**changes), tokens)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4)
    return made


def measure(made: PreTrainedModel, tokens: Corpus, documents: np.ndarray, **changes: object) -> losses.DocumentLosses:
    options = {"max_length": 16, "batch_size": 4, "device": CPU} | changes
    return losses.measure(made, tokens, documents, **options)


def one_by_one(made: PreTrainedModel, tokens: Corpus, document: int, max_length: int) -> float:
    """The definition, spelled out: each piece alone in a batch, in float64."""
    ids = [tokens.start_id, *tokens.document(document).tolist(), tokens.end_id]
    inputs, targets, total = ids[:-1], ids[1:], 0.0
    made.eval()
    for begin in range(0, len(inputs), max_length):
        with torch.no_grad():
            logits_TV = made(input_ids=torch.tensor([inputs[begin : begin + max_length]])).logits[0].double()
        chances_TV = logits_TV.log_softmax(-1)
        total -= sum(float(chances_TV[t, target]) for t, target in enumerate(targets[begin : begin + max_length]))
    return total


TOKENS = corpus_of([5, 1, 0, 40, 16, 15, 17, 31, 32, 3, 9, 9])
MODEL = gpt2(TOKENS)
DOCUMENTS = np.arange(TOKENS.num_documents)
ONE_PIECE_A_BATCH = measure(MODEL, TOKENS, DOCUMENTS, batch_size=1)

INDIFFERENT = gpt2(TOKENS)  # gives every token the same chance
with torch.no_grad():
    INDIFFERENT.get_output_embeddings().weight.zero_()


@pytest.mark.parametrize("max_length", [1, 7, 16])
def test_each_document_gets_the_loss_it_has_alone(max_length: int):
    found = measure(MODEL, TOKENS, DOCUMENTS, max_length=max_length)
    expected = [one_by_one(MODEL, TOKENS, document, max_length) for document in DOCUMENTS]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-5)
    assert found.num_tokens.tolist() == (TOKENS.lengths + 1).tolist()
    assert found.mean == pytest.approx(sum(expected) / (TOKENS.offsets[-1] + len(DOCUMENTS)), rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 50), order=st.permutations(list(range(12))), size=st.integers(1, 12))
def test_batch_size_order_and_company_change_no_loss_beyond_rounding(batch_size: int, order: list[int], size: int):
    documents = np.array(order[:size], np.int64)
    found = measure(MODEL, TOKENS, documents, batch_size=batch_size)
    assert found.documents.tolist() == documents.tolist()
    np.testing.assert_allclose(found.nats, ONE_PIECE_A_BATCH.nats[documents], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    max_length=st.integers(3, 16),
    batch_size=st.integers(1, 8),
)
def test_every_token_and_every_eos_counts_exactly_once(lengths: list[int], max_length: int, batch_size: int):
    tokens = corpus_of(lengths)
    found = measure(INDIFFERENT, tokens, np.arange(len(lengths)), max_length=max_length, batch_size=batch_size)
    # It pays log(V) for each token, wherever that stands.
    np.testing.assert_allclose(found.nats, (np.array(lengths) + 1) * math.log(tiny.VOCABULARY_SIZE), rtol=1e-6)
    assert found.mean == pytest.approx(math.log(tiny.VOCABULARY_SIZE), rel=1e-6)


def test_the_same_call_gives_the_same_bits_and_dropout_is_off():
    noisy = gpt2(TOKENS, dropout=0.5).train()
    first, second = measure(noisy, TOKENS, DOCUMENTS), measure(noisy, TOKENS, DOCUMENTS)
    assert first.nats.tobytes() == second.nats.tobytes()


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_as_before_also_when_a_forward_pass_fails(training: bool):
    made = gpt2(TOKENS).train(training)
    measure(made, TOKENS, DOCUMENTS)
    assert made.training is training
    with pytest.raises(ValueError, match="no forward pass"), torch.no_grad():
        made.register_forward_pre_hook(failing)
        measure(made, TOKENS, DOCUMENTS)
    assert made.training is training


def failing(*_: object) -> None:
    raise ValueError("no forward pass")


def test_training_goes_on_after_measuring():
    made = gpt2(TOKENS).train()
    measure(made, TOKENS, DOCUMENTS)
    made(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    assert all(weight.grad is not None for weight in made.parameters())


def test_in_16_bits_the_loss_is_still_summed_in_full_precision():
    exact = measure(MODEL, TOKENS, DOCUMENTS)
    rounded = measure(copy.deepcopy(MODEL).to(torch.bfloat16), TOKENS, DOCUMENTS)
    assert rounded.nats.tobytes() != exact.nats.tobytes()
    np.testing.assert_allclose(rounded.nats, exact.nats, rtol=0.05)
    assert not np.array_equal(rounded.nats, torch.from_numpy(rounded.nats).bfloat16().double().numpy())


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=60),
    batch_size=st.integers(1, 64),
    vocabulary_size=st.sampled_from([64, 50_257, 151_936]),
)
def test_logits_of_a_batch_are_bounded_whatever_the_vocabulary(
    lengths: list[int], batch_size: int, vocabulary_size: int
):
    tokens = corpus_of(lengths)
    pieces = losses._cut(tokens, np.arange(len(lengths)), 1024)
    batches = list(losses._batches(pieces, batch_size, vocabulary_size))
    assert np.concatenate(batches).tolist() == list(range(len(pieces.length)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * pieces.length[batch].max() * vocabulary_size <= losses.MAX_LOGITS
        assert len(batch) <= batch_size


@given(lengths=st.lists(st.integers(1, 500), min_size=8, max_size=64))
def test_batches_of_like_length_pad_little(lengths: list[int]):
    pieces = losses._cut(corpus_of(lengths), np.arange(len(lengths)), 128)
    assert (np.diff(pieces.length) <= 0).all()


def test_appending_documents_keeps_most_of_a_fixed_sample():
    before, after = corpus_of([1] * 1000), corpus_of([1] * 1000)
    more = Corpus(**vars(after) | {"hashes": np.append(before.hashes, np.arange(5, dtype=np.uint64))})
    first = losses.fixed_sample(before, np.arange(1000), 50)
    second = losses.fixed_sample(more, np.arange(1005), 50)
    assert len(first) == len(second) == 50
    assert len(set(first) - set(second)) == 5  # the five new ones have the smallest hashes there are
    assert (np.diff(first) > 0).all()
