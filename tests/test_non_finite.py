"""A step that is not finite: stopped before the update, with evidence; skipped or gone back from where asked."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import device, files, fit, loop, losses, model, runs, stage
from pipeline.loop import NonFinite
from pipeline.stage import Refusal
from tests import tiny

POISON = 7  # a token of one training document alone


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose base model turns one rare token into infinity, as broken weights or numbers too large would."""
    made = tiny.Project(tmp_path / "clone", num_epochs=4, isolate_documents=True, checkpoint_interval_steps=3)
    monkeypatch.chdir(made.folder)
    tokens = np.fromfile("data/tokens/tokens.bin", "<u2")
    tokens[tokens == POISON] = POISON + 1
    offsets = np.load("data/tokens/offsets.npy")
    tokens[offsets[34] + 2] = POISON  # document 34 trains, and is not among those measured while training
    tokens.astype("<u2").tofile("data/tokens/tokens.bin")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=tiny.VOCABULARY_SIZE, bos_token_id=63,
                   eos_token_id=63, tie_word_embeddings=False)
    )  # fmt: skip
    with torch.no_grad():
        base.transformer.wte.weight[POISON] = math.inf
    base.save_pretrained("base")
    made.set_params(model={"base": "base", "revision": files.sha256_of(made.folder / "base")})
    return made


def train(project, **changes):
    project.set_params(train={"evaluation_documents": 1} | changes)
    done = project.run("pipeline.train")
    return done


@pytest.mark.slow
def test_it_stops_in_that_step_and_one_command_runs_the_step_again(project):
    done = train(project)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the loss is nan" in done.stderr and "stopped before the update" in done.stderr
    (folder,) = project.folder.glob(".runs/*/non_finite-*")
    assert f"python -m pipeline.non_finite {folder.relative_to(project.folder)}" in done.stderr
    seen = files.read_json(folder / "step.json")
    assert seen["loss"] == "nan" and seen["grad_norms"]["transformer.h.0.attn.c_attn.weight"] == "nan"
    assert 34 in [document["document"] for document in seen["documents"]]
    assert any(f"w{POISON}w" in document["text"] for document in seen["documents"])
    assert sum(tokens.count(POISON) for tokens in seen["tokens_BT"]) == 1
    checkpoint = torch.cat([w.flatten() for w in tensors_of(folder)])
    assert int((~checkpoint.isfinite()).sum()) == 16  # the row that was infinite from the beginning, nothing else

    again = project.run("pipeline.non_finite", str(folder.relative_to(project.folder)))
    assert again.returncode == 0, again.stderr
    assert "the loss is nan" in again.stdout
    assert "the weight transformer.wte.weight is not finite before the step" in again.stdout

    project.set_params(train={"seed": 2})
    other = project.run("pipeline.non_finite", str(folder.relative_to(project.folder)))
    assert other.returncode == 1 and "has other tokens" in other.stderr
    missing = project.run("pipeline.non_finite", "nowhere")
    assert missing.returncode == 1 and "nowhere holds no step.json" in missing.stderr


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "tensors.safetensors").values()


@pytest.mark.slow
def test_skipping_leaves_out_the_update_and_counts(project):
    done = train(project, non_finite="skip", max_non_finite=4)
    assert done.returncode == 0, done.stderr
    rows = files.read_jsonl(project.folder / "reports/train.jsonl")
    skipped = [row for row in rows[1:] if "loss" not in row]
    assert len(skipped) == 4  # once an epoch
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert all("grad_norm" not in row and row["num_tokens"] > 0 for row in skipped)
    stopped = train(project, max_non_finite=3)
    assert stopped.returncode == 1 and "the loss is nan" in stopped.stderr
    assert stopped.stderr.count("Traceback") == 0


class Hook:
    """Makes the loss of a step infinite as long as the learning rate is not lowered."""

    def __init__(self, monkeypatch, step, healed_by):
        self.inside, self.step, self.healed_by = loop.train_step, step, healed_by
        monkeypatch.setattr(loop, "train_step", self)

    def __call__(self, trainer, step, batch):
        done = self.inside(trainer, step, batch)
        if step == self.step and trainer.rate_factor > self.healed_by:
            raise NonFinite(step, math.inf, math.nan, trainer.params)
        return done


def fit_here(folder, **changes):
    """Train in this process what is left to train of a project, made where it is not there; its rows and the bytes of
    its weights."""
    if not folder.exists():
        tiny.Project(folder, **{"num_epochs": 4, "checkpoint_interval_steps": 3} | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sections = stage.load_params()
        paths = stage.paths_of(stage.read_stages()["train"])
        run = runs.Run("0123456789abcdef")
        with device.join_processes(sections["train"]) as place, run.opened():
            fit.fit(run, place, paths, model.Params(base="scratch", revision=None), sections["train"], {})
        return files.read_jsonl(run.rows_file.resolve()), (run.last / "model.safetensors").read_bytes()


def test_going_back_lowers_the_rate_from_the_last_regular_checkpoint_on(tmp_path, monkeypatch, capsys):
    undisturbed, _ = fit_here(tmp_path / "other", learning_rate=2.5e-3)
    Hook(monkeypatch, step=7, healed_by=0.3)
    rows, _ = fit_here(tmp_path / "one", non_finite="roll_back", max_non_finite=2)
    assert "going back to the last regular checkpoint" in capsys.readouterr().out
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert [row["learning_rate"] for row in rows[7:]] == pytest.approx([r["learning_rate"] for r in undisturbed[7:]])
    assert rows[6]["learning_rate"] == pytest.approx(4 * undisturbed[6]["learning_rate"])


def test_interrupted_at_any_step_it_goes_back_to_the_same_one(tmp_path, monkeypatch):
    Hook(monkeypatch, step=7, healed_by=0.6)
    expected = fit_here(tmp_path / "whole", non_finite="roll_back")
    inside, fired = fit.device.any_process, []

    def interrupt_once(here):
        if not here and len(fired) < 20:
            fired.append(1)
            return len(fired) == 8  # after step 8 of the first attempt or of the second
        return inside(here)

    monkeypatch.setattr(fit.device, "any_process", interrupt_once)
    with pytest.raises(stage.Interrupted):
        fit_here(tmp_path / "cut", non_finite="roll_back")
    assert fit_here(tmp_path / "cut") == expected


def test_going_back_too_often_stops(tmp_path, monkeypatch):
    Hook(monkeypatch, step=7, healed_by=0.0)
    with pytest.raises(Refusal, match=r"step 8: the loss is inf.*\n.*python -m pipeline.non_finite"):
        fit_here(tmp_path / "one", non_finite="roll_back", max_non_finite=2)
    assert json.loads((next((tmp_path / "one" / ".runs").glob("*/non_finite-*")) / "step.json").read_text())


class Bad:
    """Makes these steps not finite, before anything of them is done; stops the run after another one."""

    def __init__(self, monkeypatch, steps, stop_after=None):
        self.inside, self.steps, self.stop_after = loop.train_step, steps, stop_after
        monkeypatch.setattr(loop, "train_step", self)

    def __call__(self, trainer, step, batch):
        if step == self.stop_after:
            self.stop_after = None
            os.kill(os.getpid(), signal.SIGTERM)
        if step in self.steps:
            raise NonFinite(step, math.nan, math.nan, trainer.params)
        return self.inside(trainer, step, batch)


def test_steps_that_are_skipped_are_the_same_ones_in_a_run_that_was_interrupted(tmp_path, monkeypatch):
    how = {"non_finite": "skip", "max_non_finite": 2}
    with monkeypatch.context() as patch:
        Bad(patch, {4, 9})
        expected = fit_here(tmp_path / "whole", **how)
    assert ["loss" in row for row in expected[0][1:12]] == [step not in {4, 9} for step in range(11)]
    Bad(monkeypatch, {4, 9}, stop_after=6)
    with pytest.raises(stage.Interrupted):
        fit_here(tmp_path / "cut", **how)
    assert fit_here(tmp_path / "cut") == expected
    Bad(monkeypatch, {4, 9, 11}, stop_after=6)
    with pytest.raises(stage.Interrupted):
        fit_here(tmp_path / "third", **how)
    with pytest.raises(Refusal, match="step 12: the loss is nan"):  # two were skipped, one of them before the stop
        fit_here(tmp_path / "third")


def test_a_stop_leaves_the_checkpoint_before_as_good_as_it_was(tmp_path, monkeypatch):
    expected = fit_here(tmp_path / "whole")
    with monkeypatch.context() as patch:
        Bad(patch, {8})
        with pytest.raises(Refusal, match="step 9: the loss is nan"):
            fit_here(tmp_path / "cut")
    assert fit_here(tmp_path / "cut") == expected


@pytest.mark.parametrize("nth", [0, 1, 9, 40, 69])
def test_stopped_while_it_measures_it_goes_on_with_the_same_bytes(tmp_path, monkeypatch, nth):
    """Also with patience: this training stops early, and how long it waited is in the checkpoint."""
    how = {"early_stopping_patience": 3, "learning_rate": 0.3, "num_epochs": 30, "evaluation_batch_size": 1}
    expected = fit_here(tmp_path / "whole", **how)
    assert len(expected[0]) < 100 and expected[0][-1]["step"] % 5 == 0
    inside, calls = losses.nats, []

    def interrupted(model, inputs_BT, *others):
        if not inputs_BT.is_meta:  # as they are where memory is foretold
            calls.append(1)
            if len(calls) == nth + 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return inside(model, inputs_BT, *others)

    monkeypatch.setattr(losses, "nats", interrupted)
    with pytest.raises(stage.Interrupted, match="before the first step" if nth < 20 else "while measuring after step"):
        fit_here(tmp_path / "cut", **how)
    assert len(calls) == nth + 1, "it stops before the next forward pass"
    assert fit_here(tmp_path / "cut") == expected
