"""One step: token-exact, the same however it is cut up, refused before it does harm."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline import cross_entropy, device, model, writer
from pipeline.batches import IGNORE
from pipeline.loop import NonFinite, learning_rate_at, train_step, train_steps
from pipeline.stage import Refusal
from pipeline.trainer import Trainer, capture, check_isolation, make_trainer, restore
from tests import tiny

SCRATCH = model.Params(base="scratch", revision=None)
HERE = device.Place(torch.device("cpu"), "none")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny.write_tokens(tmp_path_factory.mktemp("corpus") / "tokens", [3, 11, 7, 23, 9, 14] * 10)


def trainer_of(tokens, **changes) -> Trainer:
    return make_trainer(HERE, tokens, np.arange(tokens.num_documents), SCRATCH, tiny.params(**changes))


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
        batch = batches.batch_at(step)
        with torch.no_grad():
            logits = trainer.model(input_ids=batch.inputs_BT, position_ids=batch.positions_BT, use_cache=False).logits
        targets = batch.targets_BT.flatten()
        nats = float(F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"))
        num_targets = int((targets != IGNORE).sum())
        assert train_step(trainer, step, batch).loss == pytest.approx(nats / num_targets, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_gives_what_one_big_batch_gives_dropout_included(tokens, batch_size, accumulation):
    big = trainer_of(tokens, dropout=0.3, batch_size=8, gradient_accumulation=1)
    cut = trainer_of(tokens, dropout=0.3, batch_size=batch_size, gradient_accumulation=accumulation)
    assert losses(cut) == pytest.approx(losses(big), rel=1e-4)
    assert torch.allclose(weights(cut), weights(big), atol=2e-3)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_losses(tokens, monkeypatch):
    whole, halved = trainer_of(tokens), trainer_of(tokens)
    expected = losses(whole)
    inside = cross_entropy.nats

    def with_little_memory(hidden, head, targets):
        if len(targets) > 16:  # one window
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        return inside(hidden, head, targets)

    monkeypatch.setattr(cross_entropy, "nats", with_little_memory)
    steps = list(train_steps(halved, 0))
    assert [step.loss for step in steps] == pytest.approx(expected, rel=1e-4)
    assert halved.micro_batch_size == 1
    assert {step.micro_batch_size for step in steps} == {1}
    tensors, state = capture(halved)
    resumed = trainer_of(tokens)
    restore(resumed, tensors, state)
    assert resumed.micro_batch_size == 1


def test_memory_that_runs_out_between_gradient_and_update_leaves_no_half_step(tokens, monkeypatch):
    place = device.Place(torch.device("cpu"), "fp16")  # a GPU's precision; only it has a scaler with a state
    trainer = make_trainer(place, tokens, np.arange(tokens.num_documents), SCRATCH, tiny.params())
    inside, calls = torch.nn.utils.get_total_norm, []

    def once_without_memory(tensors):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inside(tensors)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", once_without_memory)
    steps = list(train_steps(trainer, 0))
    assert len(calls) == len(steps) + 1
    assert steps[1].micro_batch_size < steps[0].micro_batch_size
    assert all(math.isfinite(step.loss) for step in steps)


def test_memory_too_small_for_one_window_is_refused(tokens, monkeypatch):
    def without_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(cross_entropy, "nats", without_memory)
    with pytest.raises(Refusal, match=r"out of memory at step 1 with 1 x 16 tokens a forward pass"):
        losses(trainer_of(tokens))


def test_another_error_is_no_lack_of_memory(tokens, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(cross_entropy, "nats", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        losses(trainer_of(tokens))


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
    restore(resumed, *capture(first_half))
    assert losses(resumed, first=5) == expected[5:]
    assert torch.equal(weights(whole), weights(resumed))


def test_with_fp16_the_scaler_goes_on_where_it_was(tokens):
    place = device.Place(torch.device("cpu"), "fp16")  # a GPU's precision; only it has a scaler with a state
    whole, first_half, resumed = (
        make_trainer(place, tokens, np.arange(tokens.num_documents), SCRATCH, tiny.params()) for _ in range(3)
    )
    for trainer in (whole, first_half):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=3)
    expected = losses(whole)
    for step in train_steps(first_half, 0):
        if step.step == 5:
            break
    restore(resumed, *capture(first_half))
    assert resumed.scaler.state_dict() == first_half.scaler.state_dict() and resumed.scaler.get_scale() == 2.0
    assert losses(resumed, first=5) == expected[5:]
    assert torch.equal(weights(whole), weights(resumed))


def test_a_gradient_that_is_not_finite_stops_before_the_update_though_the_loss_is(tokens, monkeypatch):
    trainer = trainer_of(tokens)
    before = weights(trainer).clone()
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda tensors: torch.tensor(math.inf))
    with pytest.raises(NonFinite, match=r"the loss is \d\.\d+ and the gradient norm inf"):
        losses(trainer)
    assert torch.equal(weights(trainer), before)


def test_dropout_acts_and_differs_between_steps(tokens):
    trainer = trainer_of(tokens, dropout=0.5, learning_rate=1e-12)
    batch = trainer.batches.batch_at(0)
    nothing = trainer_of(tokens, dropout=0.0, learning_rate=1e-12)

    def nats(trainer, step):
        return train_step(trainer, step, batch).loss * trainer.batches.num_tokens_at(step)

    assert nats(trainer, 0) != pytest.approx(nats(trainer, 1), rel=1e-4)
    assert nats(nothing, 0) == pytest.approx(nats(nothing, 1), rel=1e-5)


def test_only_matrices_decay(tokens):
    trainer = trainer_of(tokens)
    decayed, free = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert {weight.ndim for weight in trainer.masters.matrices.weights.values()} == {2}
    assert {weight.ndim for weight in trainer.masters.vectors.weights.values()} == {1}
    assert sum(flat.numel() for group in (decayed, free) for flat in group["params"]) == trainer.num_parameters


def test_the_gradient_is_clipped_to_the_limit(tokens):
    trainer = trainer_of(tokens, max_grad_norm=1e-3)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat(trainer.masters.gradients).norm().item()))
    step = train_step(trainer, 0, trainer.batches.batch_at(0))
    assert step.grad_norm > 1e-2  # reported before clipping
    assert seen == [pytest.approx(1e-3, rel=1e-2)]


def test_a_non_finite_loss_is_refused_before_the_update(tokens):
    trainer = trainer_of(tokens)
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight[0] = math.inf
    before = weights(trainer).clone()
    with pytest.raises(NonFinite, match=r"step 1: the loss is nan.*train.learning_rate"):
        train_step(trainer, 0, trainer.batches.batch_at(0))
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
    mixed = make_trainer(place, tokens, np.arange(tokens.num_documents), SCRATCH, params)
    full = trainer_of(tokens, dropout=0.0)
    found, expected = losses(mixed), losses(full)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert all(weight.dtype == torch.bfloat16 for weight in mixed.model.parameters())
    assert all(flat.dtype == torch.float32 for flat in mixed.masters.tensors + mixed.masters.gradients)


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


def test_a_disk_too_small_for_the_checkpoints_is_refused_with_numbers(tmp_path, monkeypatch):
    num_parameters = 1_000_000
    writer.check_disk(num_parameters, tmp_path)
    needed = 20 * 4 * num_parameters
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, needed - 1))
    with pytest.raises(Refusal, match=r"will take about 0\.1 GB, but only 0\.1 GB are free"):
        writer.check_disk(num_parameters, tmp_path)
