"""One step: token-exact, the same however it is cut up, refused before it does harm."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline import device, fit, model
from pipeline.batches import IGNORE
from pipeline.loop import Trainer, check_isolation, learning_rate_at, make_optimizer, train_step, train_steps
from pipeline.stage import Refusal
from tests import tiny

SCRATCH = model.Params(base="scratch", revision=None)
HERE = device.Place(torch.device("cpu"), "none")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny.write_tokens(tmp_path_factory.mktemp("corpus") / "tokens", [3, 11, 7, 23, 9, 14] * 10)


def trainer_of(tokens, **changes) -> Trainer:
    return fit.make_trainer(HERE, tokens, np.arange(tokens.num_documents), SCRATCH, tiny.params(**changes))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def losses(trainer: Trainer, first: int = 0) -> list[float]:
    return [step.loss for step in train_steps(trainer, first)]


def test_training_lowers_the_loss(tokens):
    found = losses(trainer_of(tokens, num_epochs=6, dropout=0.0))
    assert found[0] == pytest.approx(math.log(tiny.VOCABULARY_SIZE), rel=0.02)
    assert np.mean(found[-5:]) < found[0] - 1


def test_the_loss_is_the_mean_over_all_tokens_of_the_step_ragged_last_step_included(tokens):
    trainer = trainer_of(tokens, dropout=0.0)
    batches = trainer.batches
    last = batches.steps_per_epoch - 1
    assert len({batches.num_tokens_at(step) for step in (0, 1, last)}) > 1  # not all steps are of one size
    for step in (0, 1, last):
        micro_batches = batches.batches_at(step)
        nats, num_targets = 0.0, 0
        with torch.no_grad():
            for batch in micro_batches:
                logits = trainer.model(
                    input_ids=batch.inputs_BT, position_ids=batch.positions_BT, use_cache=False
                ).logits
                targets = batch.targets_BT.flatten()
                nats += float(F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"))
                num_targets += int((targets != IGNORE).sum())
        assert train_step(trainer, step, micro_batches).loss == pytest.approx(nats / num_targets, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_gives_what_one_big_batch_gives(tokens, batch_size, accumulation):
    big = trainer_of(tokens, dropout=0.0, batch_size=8, gradient_accumulation=1)
    cut = trainer_of(tokens, dropout=0.0, batch_size=batch_size, gradient_accumulation=accumulation)
    assert losses(cut) == pytest.approx(losses(big), rel=1e-4)
    assert torch.allclose(weights(cut), weights(big), atol=2e-3)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tokens):
    one, again, other = (trainer_of(tokens, seed=seed) for seed in (1, 1, 2))
    assert losses(one) == losses(again)
    assert torch.equal(weights(one), weights(again))
    losses(other)
    assert not torch.equal(weights(one), weights(other))


def test_resuming_from_a_checkpoint_gives_the_same_bytes_with_dropout(tokens):
    whole, first_half, resumed = trainer_of(tokens), trainer_of(tokens), trainer_of(tokens)
    expected = losses(whole)
    for step in train_steps(first_half, 0):
        if step.step == 5:
            break
    standing = fit.Standing(best_validation_loss=1.0, best_step=3, num_evaluations_since_best=1)
    checkpoint = fit.capture(first_half, standing, 5)
    assert fit.restore(resumed, checkpoint) == standing
    assert losses(resumed, first=5) == expected[5:]
    assert torch.equal(weights(whole), weights(resumed))


def test_dropout_acts_and_differs_between_steps_and_micro_batches(tokens):
    trainer = trainer_of(tokens, dropout=0.5, learning_rate=1e-12)
    batch = trainer.batches.batches_at(0)[0]
    nothing = trainer_of(tokens, dropout=0.0, learning_rate=1e-12)

    def nats(trainer, step, micro_batches):
        return train_step(trainer, step, micro_batches).loss * trainer.batches.num_tokens_at(step)

    alone = [nats(trainer, step, [batch]) for step in (0, 1)]
    assert alone[0] != pytest.approx(alone[1], rel=1e-4)
    assert nats(nothing, 0, [batch]) == pytest.approx(nats(nothing, 1, [batch]), rel=1e-5)
    # The same micro-batch twice in one step: were the masks equal too, the loss would be exactly doubled.
    assert nats(trainer, 0, [batch, batch]) != pytest.approx(2 * alone[0], rel=1e-4)


def test_only_matrices_decay():
    network = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, bos_token_id=0, eos_token_id=0))
    decayed, free = make_optimizer(network, tiny.params()).param_groups
    assert decayed["weight_decay"] == 0.1 and {w.ndim for w in decayed["params"]} == {2}
    assert free["weight_decay"] == 0.0 and {w.ndim for w in free["params"]} == {1}
    assert sum(w.numel() for w in decayed["params"] + free["params"]) == fit.num_parameters(network)


def test_the_gradient_is_clipped_to_the_limit(tokens):
    trainer = trainer_of(tokens, max_grad_norm=1e-3)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([w.grad.flatten() for w in trainer.model.parameters()]).norm().item())
    )
    step = train_step(trainer, 0, trainer.batches.batches_at(0))
    assert step.grad_norm > 1e-2  # reported before clipping
    assert seen == [pytest.approx(1e-3, rel=1e-2)]


def test_a_non_finite_loss_is_refused_before_the_update(tokens):
    trainer = trainer_of(tokens)
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight[0] = math.inf
    before = weights(trainer).clone()
    with pytest.raises(Refusal, match=r"step 1: the loss is nan.*train.learning_rate"):
        train_step(trainer, 0, trainer.batches.batches_at(0))
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_climbs_to_its_peak_and_falls_towards_zero(schedule):
    params = tiny.params(schedule=schedule, warmup_ratio=0.1, learning_rate=1e-3)
    rates = [learning_rate_at(step, 100, params) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * n for n in range(1, 11)])
    assert max(rates) == 1e-3 == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 2e-5
    halfway = learning_rate_at(55, 100, params)
    assert halfway == pytest.approx(5e-4)


def test_without_warmup_the_first_step_has_the_peak():
    assert learning_rate_at(0, 10, tiny.params(warmup_ratio=0.0)) == 1e-2


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_gives_about_the_same_losses(tokens, precision):
    place = device.Place(torch.device("cpu"), precision)
    params = tiny.params(dropout=0.0)
    mixed = fit.make_trainer(place, tokens, np.arange(tokens.num_documents), SCRATCH, params)
    full = trainer_of(tokens, dropout=0.0)
    found, expected = losses(mixed), losses(full)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in mixed.model.parameters())


class Leaky(GPT2LMHeadModel):
    """A model that pays no attention to positions beginning anew."""

    def forward(self, input_ids, position_ids, **options):
        return super().forward(input_ids=input_ids, **options)


def test_a_model_in_which_documents_see_each_other_is_refused():
    small = dict(vocab_size=64, bos_token_id=0, eos_token_id=0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, **small)
    check_isolation(GPT2LMHeadModel(config), 64, HERE.device)
    llama = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **small
    )
    check_isolation(LlamaForCausalLM(llama), 64, HERE.device)
    with pytest.raises(Refusal, match="documents packed into one window see each other in Leaky"):
        check_isolation(Leaky(config), 64, HERE.device)


def test_a_disk_too_small_for_the_checkpoints_is_refused_with_numbers(tokens, tmp_path, monkeypatch):
    trained = trainer_of(tokens).model
    fit.check_disk(trained, tmp_path)
    needed = 15 * 4 * fit.num_parameters(trained)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, needed - 1))
    with pytest.raises(Refusal, match=r"will take about 0\.0 GB, but only 0\.0 GB are free"):
        fit.check_disk(trained, tmp_path)
