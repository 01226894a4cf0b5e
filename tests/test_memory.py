"""Memory: predicted from the parameters, refused before it runs out, and survived when it does."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig

from pipeline import device, footprint, loop, memory, room
from pipeline.footprint import Rehearsal
from pipeline.stage import Refusal
from tests import tiny
from tests.test_loop import trainer_of

CPU = device.Place(torch.device("cpu"), "none")
SMALL = dict(bos_token_id=0, eos_token_id=0)
CONFIG = GPT2Config(vocab_size=1000, n_positions=64, n_layer=2, n_head=2, n_embd=32, **SMALL)
GROUPED = LlamaConfig(
    vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, **SMALL,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny.write_tokens(tmp_path_factory.mktemp("corpus") / "tokens", [3, 11, 7, 23, 9, 14] * 10)


def rehearsal(config=CONFIG, kind="cpu", dtype=torch.float32, **changes):
    return Rehearsal(config, tiny.params(**changes), dtype, kind)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["gpt2", "llama"])
def test_the_state_takes_16_bytes_a_weight_and_18_in_16_bits(config, kind):
    for dtype, num_bytes in ((torch.float32, 16), (torch.bfloat16, 18)):
        small = rehearsal(config, kind, dtype)
        buffers = sum(buffer.nbytes for buffer in small.model.buffers())
        assert small.footprint(1, 16).state == num_bytes * small.num_parameters + buffers
        assert small.footprint(1, 16).copy == 16 * small.num_parameters


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["gpt2", "llama"])
def test_activations_grow_with_windows_tokens_and_dropout(config, kind):
    def work(size, length, **changes):
        return rehearsal(config, kind, evaluation_batch_size=1, **changes).footprint(size, length).work

    one, two, four = (work(size, 32) for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02) and two > one
    assert work(1, 64) > one
    assert work(4, 32, mixed_precision="none") == four


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_rehearsed_is_what_a_real_step_allocates(tokens, dropout):
    trainer = trainer_of(tokens, dropout=dropout, gradient_accumulation=1, max_length=64)
    batches = trainer.batches
    batch = batches.batch_at(0)
    recorder = footprint._Recorder()
    with recorder:
        # Storages that were there before count as made when they are first seen: once around to see them.
        loop.train_step(trainer, 0, batch)
        recorder.trace = []
        loop.train_step(trainer, 1, batches.batch_at(1))
    rehearsed = Rehearsal(trainer.model.config, trainer.params, torch.float32, "cpu")
    expected = rehearsed.footprint(len(batches.batch_at(1).windows), 64)
    assert max(footprint._alive(recorder.trace)) == pytest.approx(expected.work, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2**23)), max_size=60))
def test_blocks_of_the_rehearsed_heap_never_overlap(wishes):
    heap, trace, alive = footprint._Heap(), [], {}
    for key, size in wishes:
        event = (key, 0) if key in alive else (key, size)
        alive.pop(key) if key in alive else alive.update({key: size})
        trace.append(event)
        end = heap.high_water_mark([event])
        places = sorted([*heap._blocks.values(), *heap._gaps])
        assert all(one + size <= other for (one, size), (other, _) in itertools.pairwise(places))
        assert all(start + size <= end for start, size in places)


# --- before training -------------------------------------------------------------------------------------------------


WIDE = dict(batch_size=16, max_length=64, evaluation_batch_size=1)
HEAVY = GPT2Config(vocab_size=50_000, n_positions=64, n_layer=1, n_head=2, n_embd=32, **SMALL)


def allow(monkeypatch, num_bytes):
    monkeypatch.setattr(memory, "available", lambda _: {"host": num_bytes})


def peak(num_windows, length=64):
    return rehearsal(HEAVY, **WIDE).footprint(num_windows, length).peak("cpu")["host"] + 2**21


def test_where_memory_suffices_auto_is_the_batch_and_a_number_is_kept(monkeypatch):
    allow(monkeypatch, 2**50)
    assert memory.fitting(CPU, HEAVY, tiny.params(**WIDE)) == 16
    assert memory.fitting(CPU, HEAVY, tiny.params(**WIDE, micro_batch_size=3)) == 3
    assert memory.fitting(CPU, HEAVY, tiny.params(**WIDE, micro_batch_size=30)) == 30  # over two batches
    assert memory.fitting(CPU, HEAVY, tiny.params(**WIDE, micro_batch_size=99)) == 32  # all windows of a step
    one_of_four = device.Place(CPU.device, "none", world_size=4)
    assert memory.fitting(one_of_four, HEAVY, tiny.params(**WIDE)) == 8


def test_where_memory_is_short_auto_takes_what_fits_in_passes_of_one_size(monkeypatch):
    allow(monkeypatch, peak(10))
    assert memory.fitting(CPU, HEAVY, tiny.params(**WIDE)) == 8


def test_a_number_that_does_not_fit_is_refused_with_the_largest_that_does(monkeypatch):
    allow(monkeypatch, peak(10))
    with pytest.raises(Refusal) as refused:
        memory.fitting(CPU, HEAVY, tiny.params(**WIDE, micro_batch_size=16))
    assert re.fullmatch(
        r"training with 16 windows of 64 tokens a forward pass takes about \d\.\d GB of memory \(.*\), but \d\.\d GB "
        r"are available; at most 1\d fit: set train.micro_batch_size to 1\d, or to auto; train.batch_size may stay, "
        r"for no loss depends on it",
        str(refused.value),
    )


def test_where_not_even_one_window_fits_it_is_said_what_would(monkeypatch):
    long = GPT2Config(vocab_size=50_000, n_positions=256, n_layer=1, n_head=2, n_embd=32, **SMALL)
    params = tiny.params(**WIDE | {"max_length": 256})
    some = Rehearsal(long, params, torch.float32, "cpu").footprint(1, 64).peak("cpu")["host"]
    allow(monkeypatch, some + 2**24)
    with pytest.raises(Refusal, match=r"with 1 window of 256 tokens .*; train.max_length: 64 would fit$"):
        memory.fitting(CPU, long, params)
    allow(monkeypatch, 10**6)
    with pytest.raises(Refusal, match=r"choose a model of at most 0 million weights instead of 2$"):
        memory.fitting(CPU, long, params)


def test_on_a_gpu_its_own_memory_and_that_of_the_machine_are_looked_at(monkeypatch):
    gpu = device.Place(torch.device("cuda"), "bf16")
    parts = rehearsal(HEAVY, "cuda", torch.bfloat16, **WIDE).footprint(16, 64).peak("cuda")
    enough = {where: num_bytes + 2**24 for where, num_bytes in parts.items()}
    monkeypatch.setattr(memory, "available", lambda _: enough)
    assert memory.fitting(gpu, HEAVY, tiny.params(**WIDE)) == 16
    monkeypatch.setattr(memory, "available", lambda _: enough | {"gpu": parts["gpu"] - 1})
    assert memory.fitting(gpu, HEAVY, tiny.params(**WIDE)) < 16
    monkeypatch.setattr(memory, "available", lambda _: enough | {"host": 10**6})
    with pytest.raises(Refusal, match=r"of memory .*for the copy that is written to disk"):
        memory.fitting(gpu, HEAVY, tiny.params(**WIDE))


def test_the_table_has_a_row_a_model_and_marks_what_fits(monkeypatch):
    monkeypatch.setattr(memory, "FAMILY", {"small": (1, 2, 32), "large": (2, 2, 64)})
    monkeypatch.setattr(memory, "SIZES", (1, 2))
    allow(monkeypatch, 10**12)
    own, small, large = list(memory.rows(64, tiny.params(), HEAVY))[2:]
    assert own.split()[0] == "params.yaml" and small.split()[:2] == ["small", "1.7M"]
    assert len(large.split()) == 2 + 2 * 2
    assert [cell.endswith("*") for cell in large.split()[2:]] == [False, False, True, True]  # there is no GPU here
    allow(monkeypatch, 1)
    assert "*" not in "".join(memory.rows(64, tiny.params(), None))


# --- the room --------------------------------------------------------------------------------------------------------


def limit(monkeypatch, tmp_path, lines, files):
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(room, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(room, "OF_PROCESS", tmp_path / "own")


GROUP = {"memory.current": 700, "memory.stat": "anon 1\ninactive_file 200"}


@pytest.mark.parametrize("own", ["/", "/outer/inner", "/not/seen/from/inside"])
def test_limits_of_control_groups_count_and_files_in_memory_do_not(monkeypatch, tmp_path, own):
    files = {"memory.max": "1000"} | GROUP | {f"outer/{name}": text for name, text in GROUP.items()}
    limit(monkeypatch, tmp_path, f"0::{own}\n", files | {"outer/memory.max": "max"})
    assert list(room._free_in_groups()) == [500]


def test_limits_of_the_first_version_count_too(monkeypatch, tmp_path):
    names = {"limit_in_bytes": "1000", "usage_in_bytes": "900", "stat": "total_inactive_file 50"}
    files = {f"memory/box/memory.{name}": text for name, text in names.items()}
    limit(monkeypatch, tmp_path, "3:cpu:/\n4:memory:/box\n0::/\n", files)
    assert list(room._free_in_groups()) == [150]


def test_without_control_groups_the_machine_is_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "OF_PROCESS", tmp_path / "none")
    assert list(room._free_in_groups()) == []
    assert room.on_host() > 100e6


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["test-wide", "test-long"])
def test_the_prediction_is_within_15_percent_of_the_measured_peak(shape):
    done = subprocess.run([sys.executable, "-m", "bench.memory", "--here", shape], cwd=tiny.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] - found["process"] > 200e6  # it is about something
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)


SHORT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from pipeline import launcher
launcher.settle()
import numpy as np, psutil, torch
from pipeline import corpus, device, fit, files, loop, memory, model, room, runs
from pipeline.footprint import Rehearsal
from pipeline.trainer import make_trainer
from tests import tiny

def allow(num_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, resource.RLIM_INFINITY))

shape = {"num_layers": 4, "num_heads": 4, "embedding_size": 128}
params = tiny.params(scratch=shape, max_length=256, batch_size=16, gradient_accumulation=1, num_epochs=1)
folder, here = Path(sys.argv[1]), device.Place(torch.device("cpu"), "none")
tokens = tiny.write_tokens(folder / "tokens", [255] * 48)
tiny.write_split(folder / "split", 48)
base = model.Params(base="scratch", revision=None)

def trainer():
    return make_trainer(here, tokens, np.arange(48), base, params)

one = trainer()
one.micro_batch_size = 1  # little memory, but all libraries are loaded
batch = one.batches.batch_at(0)
loop.train_step(one, 0, batch)
short = trainer()
allow(psutil.Process().memory_info().vms + 200_000_000)
found = list(loop.train_steps(short, 0))
allow(resource.RLIM_INFINITY)
expected = list(loop.train_steps(trainer(), 0))

config = model.initial_config(base, params, tokens.vocabulary_size, tokens.start_id, tokens.end_id)
takes = Rehearsal(config, params, torch.float32, "cpu").footprint(7, 256).peak("cpu")["host"]
process = psutil.Process().memory_info()
runs.ROOT = folder / "runs"
run = runs.Run("0" * 64)
with run.opened():
    allow(takes - process.rss + process.vms + 5_000_000)
    paths = {"tokens": folder / "tokens", "split": folder / "split"}
    fit.fit(run, here, paths, base, params, {})
rows = files.read_jsonl(run.rows_file)
print(json.dumps({
    "losses": [[step.loss for step in steps] for steps in (expected, found)],
    "sizes": [step.micro_batch_size for step in found],
    "rows": [row.get("micro_batch_size") for row in rows],
}))
"""


@pytest.mark.slow
def test_a_real_lack_of_memory_costs_speed_and_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path)], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    expected, losses = found["losses"]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert max(found["sizes"]) <= 8  # halved at least once, by an allocation that failed
    row_of_start, first, *others = found["rows"]
    assert row_of_start is None and 0 < first < 16 and set(others) == {None}  # seen before the first step
    assert [line for line in lines if f"memory is short, from here on {first} windows" in line]


def test_the_table_is_a_command():
    """Of the whole family, for a machine with a GPU and one without, by windows a forward pass."""
    command = [sys.executable, "-m", "pipeline.memory", "--length", "64"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("params.yaml", *memory.FAMILY))]
    assert [row[0] for row in rows] == ["params.yaml", *memory.FAMILY]
    assert all(len(row) == 2 + 2 * len(memory.SIZES) for row in rows)
    gigabytes = [[float(cell.rstrip("*")) for cell in row[2:]] for row in rows]
    assert all(row == sorted(row) for one in gigabytes for row in (one[:5], one[5:]))
