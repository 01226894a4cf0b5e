"""The train stage as a process: what it writes, how it is interrupted, goes on and refuses."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline import files, rules
from tests import tiny

pytestmark = pytest.mark.slow
KNOWN = {rule.verdict for rule in (*rules.RULES, rules.HEALTHY)}


@pytest.fixture
def start():
    """Starts trainings that the test's end ends."""
    started = []

    def start_one(project: tiny.Project) -> "subprocess.Popen[str]":
        started.append(project.start("pipeline.train"))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def wait_for_rows(project: tiny.Project, num_rows: int) -> Path:
    """The run's folder, once training has done so many steps."""
    for _ in range(1200):
        for rows in project.folder.glob(".runs/*/train.jsonl"):
            if rows.read_bytes().count(b"\n") >= num_rows:
                return rows.parent
        time.sleep(0.05)
    raise AssertionError("training did not get that far")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An undisturbed run, long enough to be interrupted in others."""
    project = tiny.Project(tmp_path_factory.mktemp("trained") / "näme with space", num_epochs=60)
    done = project.run("pipeline.train")
    assert done.returncode == 0, done.stderr
    return project, done


def test_it_writes_two_model_folders_that_transformers_loads(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    project, _ = trained
    for name in ("best", "last"):
        folder = project.folder / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.n_layer == 2
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == tiny.END_ID
        about = files.read_json(folder / "training.json")
        assert about["num_parameters"] == sum(w.numel() for w in model.parameters())
    assert files.read_json(project.folder / "models/last/training.json")["stopped"] == "finished"


def test_it_writes_a_row_a_step_with_the_fields_of_the_contract(trained):
    project, done = trained
    first, *rows = files.read_jsonl(project.folder / "reports/train.jsonl")
    assert {"step", "epoch", "num_tokens", "train_eval_loss", "validation_loss", "validation_loss_ci95"} == set(first)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all({"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens"} <= set(row) for row in rows)
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["epoch"] for row in evaluations] == [float(n) for n in range(1, 61)]
    best = min(row["validation_loss"] for row in evaluations)
    assert files.read_json(project.folder / "models/best/training.json")["validation_loss"] == best
    assert best < first["validation_loss"] - 1
    assert "* new best" in done.stdout and "epoch 60/60" in done.stdout
    assert re.search(r"gap [+-][\d.]+  slope [+-][\d.e+-]+  gradient [\d.]+  decay  ", done.stdout)
    for row in evaluations:
        low, high = row["validation_loss_ci95"]
        assert low <= row["validation_loss"] <= high
    lines = [line for line in done.stdout.splitlines() if line.startswith("train: epoch ")]
    assert len(lines) == 60 and all(KNOWN & set(line.rsplit("  ", 1)[1].split(", ")) for line in lines)
    assert "still_improving" in lines[1]


def test_running_it_again_trains_nothing_and_writes_the_same(trained):
    project, _ = trained
    before = project.hashes()
    again = project.run("pipeline.train")
    assert again.returncode == 0
    assert "epoch" not in again.stdout
    assert project.hashes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_run_again_it_ends_with_the_same_bytes(trained, tmp_path, start, number, code):
    project = tiny.Project(tmp_path / "clone", num_epochs=60)
    for num_rows in (10, 100):  # twice, so that a resumed run is resumed too
        process = start(project)
        wait_for_rows(project, num_rows)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "the state is saved in" in err and "Traceback" not in err
    assert not (project.folder / "models").exists()
    done = project.run("pipeline.train")
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert project.hashes() == trained[0].hashes()


def test_killed_and_run_again_it_ends_with_the_same_bytes(trained, tmp_path, start):
    project = tiny.Project(tmp_path / "clone", num_epochs=60)
    process = start(project)
    folder = wait_for_rows(project, 50)
    process.kill()
    process.communicate()
    newest = max(folder.glob("checkpoint-*"))  # and its newest checkpoint was damaged
    weights = newest / "tensors.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (folder / ".manifest.json.partial").write_text("half")  # and it was killed while it wrote these
    (folder / ".best-00000050.partial").mkdir()
    done = project.run("pipeline.train")
    assert done.returncode == 0, done.stderr
    assert "is damaged (tensors.safetensors has changed); going back to the one before" in done.stdout
    assert project.hashes() == trained[0].hashes()
    assert not list(folder.glob(".*.partial"))


def test_rows_that_change_while_training_goes_on_are_no_result(trained, tmp_path, start):
    project = tiny.Project(tmp_path / "clone", num_epochs=60)
    process = start(project)
    folder = wait_for_rows(project, 50)
    process.send_signal(signal.SIGSTOP)
    with (folder / "train.jsonl").open("r+b") as rows:
        byte = rows.read(1)
        rows.seek(0)
        rows.write(bytes([byte[0] ^ 1]))
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "has changed since it was written" in err and "Traceback" not in err
    assert not (project.folder / "models").exists()
    assert project.run("pipeline.train").returncode == 0
    assert project.hashes() == trained[0].hashes()


def test_other_parameters_start_clean(tmp_path, start):
    project = tiny.Project(tmp_path / "clone", num_epochs=3000)
    process = start(project)
    wait_for_rows(project, 10)
    process.terminate()
    process.communicate()
    project.set_params(train={"num_epochs": 1})
    done = project.run("pipeline.train")
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stdout
    assert len(files.read_jsonl(project.folder / "reports/train.jsonl")) < 10


def test_two_processes_give_the_losses_of_one(tmp_path):
    changes = {"dropout": 0.0, "num_epochs": 3, "max_length": 8}
    alone = tiny.Project(tmp_path / "alone", **changes)
    assert alone.run("pipeline.train").returncode == 0
    shared = tiny.Project(tmp_path / "shared", **changes)
    done = shared.run(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "pipeline.train",
    )
    assert done.returncode == 0, done.stderr
    one, two = (files.read_jsonl(project.folder / "reports/train.jsonl") for project in (alone, shared))
    assert len(one) == len(two) > 10
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert other[name] == pytest.approx(row[name], rel=1e-3), name


def test_it_stops_early_when_the_validation_loss_no_longer_falls(tmp_path):
    project = tiny.Project(
        tmp_path / "clone", num_documents=20, num_epochs=400, learning_rate=0.05, early_stopping_patience=2
    )
    done = project.run("pipeline.train")
    assert done.returncode == 0, done.stderr
    about = {name: files.read_json(project.folder / f"models/{name}/training.json") for name in ("best", "last")}
    assert about["last"]["stopped"] == "early_stopping"
    assert about["last"]["step"] < about["last"]["num_steps"]
    evaluations = [row for row in files.read_jsonl(project.folder / "reports/train.jsonl") if "validation_loss" in row]
    assert evaluations[-3]["step"] == about["best"]["step"]
    assert "stopped early" in done.stdout


@pytest.mark.parametrize(
    ("train", "model", "message"),
    [
        ({"device": "cuda:7"}, {}, "train.device is 'cuda:7'"),
        ({"mixed_precision": "fp16", "device": "cpu"}, {}, "mixed_precision fp16 needs a GPU"),
        ({}, {"base": "./nowhere"}, "there is no folder ./nowhere"),
        ({}, {"base": "gpt2"}, "pin gpt2 to a commit"),
        ({}, {"base": "gpt2", "revision": "0" * 40}, "gpt2 could not be loaded: http://127.0.0.1:9 cannot be reached"),
        ({"max_length": 4096}, {"base": "base"}, "train.max_length is 4096, but base has 1024 positions"),
        ({}, {"base": "small"}, "the tokenizer has 64 tokens, but small only 10"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, train, model, message):
    from transformers import GPT2Config

    project = tiny.Project(tmp_path / "clone", **train)
    for name, vocabulary_size in (("base", 64), ("small", 10)):
        folder = project.folder / name
        small = dict(n_layer=1, n_head=1, n_embd=8, bos_token_id=0, eos_token_id=0)
        GPT2Config(vocab_size=vocabulary_size, **small).save_pretrained(folder)
        if model.get("base") == name:
            model = model | {"revision": files.sha256_of(folder)}
    project.set_params(model=model)
    # A port that nobody listens on stands for a network without the Hub.
    done = project.run("pipeline.train", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (project.folder / "models").exists()


def test_weights_of_a_folder_are_pinned_by_their_bytes(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    project = tiny.Project(tmp_path / "clone", num_epochs=1)
    small = dict(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=64, bos_token_id=63, eos_token_id=63)
    GPT2LMHeadModel(GPT2Config(**small)).save_pretrained(project.folder / "base")
    project.set_params(model={"base": "base"})
    refused = project.run("pipeline.train")
    digest = files.sha256_of(project.folder / "base")
    assert refused.returncode == 1 and digest in refused.stderr
    project.set_params(model={"revision": digest})
    done = project.run("pipeline.train")
    assert done.returncode == 0, done.stderr
    assert json.loads((project.folder / "models/best/config.json").read_text())["n_embd"] == 8
    assert "base" not in (project.folder / "models/best/config.json").read_text()
