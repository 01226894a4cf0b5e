import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import losses, model
from pipeline.calibration import NUM_BINS, Calibration
from tests import tiny
from tests.test_losses import DOCUMENTS, INDIFFERENT, MODEL, ONE_PIECE_A_BATCH, TOKENS, corpus_of, measure

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> Calibration:
    nats_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=losses.IGNORED, reduction="none")
    found = Calibration()
    found.add(logits_TV, targets_T, nats_T)
    return found


def opinions(num_tokens: int) -> torch.Tensor:
    return 3 * torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0))


def drawn_from(logits_TV: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits_TV.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]


def test_a_model_whose_targets_are_drawn_from_its_own_probabilities_is_calibrated():
    logits_TV = opinions(50_000)
    found = counted(logits_TV, drawn_from(logits_TV))
    assert found.error < 0.01
    assert (found.num_tokens > 0).sum() > 10
    # The same targets, from a model that says the same more loudly.
    assert counted(3 * logits_TV, drawn_from(logits_TV)).error > 0.1


def test_an_overconfident_model_has_the_error_that_arithmetic_gives_it():
    logits_TV = torch.tensor([[math.log(9), 0.0]]).repeat(1000, 1)  # always sure of the first, with 0.9
    found = counted(logits_TV, torch.tensor([0] * 600 + [1] * 400))
    assert found.error == pytest.approx(0.9 - 0.6)
    assert found.num_tokens[13] == 1000 and found.num_right[13] == 600  # 13/15 < 0.9 < 14/15


def test_errors_of_bins_in_which_it_errs_to_either_side_add_up():
    sure, unsure = torch.tensor([[math.log(9), 0.0]]), torch.tensor([[math.log(1.5), 0.0]])  # 0.9 and 0.6
    logits_TV = torch.cat([sure.repeat(50, 1), unsure.repeat(150, 1)])
    found = counted(logits_TV, torch.tensor([0] * 25 + [1] * 25 + [0] * 150))
    assert found.error == pytest.approx(0.25 * (0.9 - 0.5) + 0.75 * (1 - 0.6))


def test_confidence_is_the_largest_probability():
    logits_TV = opinions(500)
    found = counted(logits_TV, drawn_from(logits_TV))
    expected_T = logits_TV.softmax(-1).max(-1).values.double().numpy()
    sums = np.histogram(expected_T, NUM_BINS, (0, 1), weights=expected_T)[0]
    np.testing.assert_allclose(found.confidence, sums, rtol=1e-5)


def test_padding_does_not_count_and_whole_certainty_is_in_the_last_bin():
    logits_TV = torch.zeros(5, 4)
    logits_TV[:, 2] = 1000
    found = counted(logits_TV, torch.tensor([2, 2, 1, losses.IGNORED, losses.IGNORED]))
    assert found.num_tokens.tolist() == [0] * (NUM_BINS - 1) + [3]
    assert found.num_right[-1] == 2
    assert found.error == pytest.approx(1 / 3)


def test_probabilities_that_are_no_numbers_are_counted_and_give_no_error():
    found = counted(torch.full((3, 4), math.nan), torch.tensor([0, 1, 2]))
    assert found.num_tokens.sum() == 3
    assert math.isnan(found.error)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    max_length=st.integers(3, 16),
    batch_size=st.integers(1, 8),
)
def test_every_predicted_token_is_in_exactly_one_bin(lengths: list[int], max_length: int, batch_size: int):
    tokens, found = corpus_of(lengths), Calibration()
    documents = np.arange(len(lengths))
    measure(INDIFFERENT, tokens, documents, max_length=max_length, batch_size=batch_size, calibration=found)
    assert found.num_tokens.sum() == sum(lengths) + len(lengths)
    # It gives each token the same chance, and of equals the first counts as the likeliest.
    assert found.num_right.sum() == (tokens.tokens == 0).sum()
    assert found.confidence.sum() / found.num_tokens.sum() == pytest.approx(1 / tiny.VOCABULARY_SIZE, rel=1e-5)


def test_counting_changes_no_bit_of_a_loss():
    found = measure(MODEL, TOKENS, DOCUMENTS, batch_size=1, calibration=Calibration())
    assert found.nats.tobytes() == ONE_PIECE_A_BATCH.nats.tobytes()


def test_in_16_bits_confidences_are_those_of_float32():
    made = model.initial_model(model.Params(base="scratch", revision=None), tiny.params(), TOKENS).to(torch.bfloat16)
    found = Calibration()
    measure(made, TOKENS, DOCUMENTS, calibration=found)
    assert found.num_tokens.sum() == ONE_PIECE_A_BATCH.num_tokens.sum()
    mean = found.confidence.sum() / found.num_tokens.sum()
    assert mean != torch.tensor(mean).bfloat16().double()
