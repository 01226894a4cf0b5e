"""What a training says where it does not go on from the progress that is there."""

import os

import pytest

from pipeline import files, resume, runs
from pipeline.stage import Refusal
from tests import tiny

WAS = {
    "data and code": {"data/split": "a", "data/tokens": "b", "pipeline/loop.py": "c", "pipeline/old.py": "d"},
    "params": {"model": {"base": "scratch"}, "train": {"learning_rate": 0.002, "scratch": {"num_layers": 2}}},
    "numeric class": {"threads": 2, "libraries": {"torch": "2.13.0"}},
}
NOW = {
    "data and code": {"data/split": "x", "data/tokens": "b", "pipeline/loop.py": "y", "pipeline/new.py": "d"},
    "params": {"model": {"base": "scratch"}, "train": {"learning_rate": 0.001, "scratch": {"num_layers": 3}, "z": 1}},
    "numeric class": {"threads": 4, "libraries": {"torch": "2.14.0"}},
}
ALL = [
    "data/split: changed",
    "pipeline/loop.py: changed",
    "pipeline/new.py: is new",
    "pipeline/old.py: is gone",
    "params.train.learning_rate: was 0.002, is 0.001",
    "params.train.scratch.num_layers: was 2, is 3",
    "params.train.z: was not there, is 1",
    "numeric class libraries.torch: was 2.13.0, is 2.14.0",
    "numeric class threads: was 2, is 4",
]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(resume.ASKED, raising=False)


def left(made_of, step=300, age_s=0):
    """A run that stopped after this step."""
    run = runs.Run(runs.fingerprint(made_of))
    checkpoint = run.folder / f"checkpoint-{step:08d}"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (1e9 - age_s, 1e9 - age_s))
    resume.remember(run, made_of)
    return run


def listing(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_every_key_that_differs_has_its_line_and_no_other():
    assert resume.differences(WAS, NOW) == ALL
    assert resume.differences(WAS, WAS) == []


def test_asked_to_resume_another_fingerprint_is_refused_key_by_key_and_nothing_is_touched(tmp_path, monkeypatch):
    run = left(WAS)
    left(WAS | {"params": {}}, step=5, age_s=60)  # older
    (left(WAS | {"params": {"a": 1}}, age_s=-60).folder / "last").mkdir()  # finished
    monkeypatch.setenv(resume.ASKED, "1")
    before = listing(tmp_path)
    with pytest.raises(Refusal) as refused:
        resume.check(runs.Run(runs.fingerprint(NOW)), NOW)
    message = str(refused.value)
    assert f"{run.folder} (after step 300)" in message
    assert [line.strip() for line in message.splitlines()[1:-1]] == ALL
    assert listing(tmp_path) == before


def test_without_asking_one_line_says_what_is_left_behind(capsys):
    run = left(WAS)
    resume.check(runs.Run(runs.fingerprint(NOW)), NOW)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"train: starting clean, not from {run.folder} (after step 300), which differs: "
        "data/split: changed; pipeline/loop.py: changed; pipeline/new.py: is new; and 6 more"
    )


@pytest.mark.parametrize("asked", ["1", "", "0"])
def test_the_same_fingerprint_goes_on_silently(capsys, monkeypatch, asked):
    monkeypatch.setenv(resume.ASKED, asked)
    left(NOW)
    resume.check(left(WAS), WAS)
    assert capsys.readouterr().out == ""


def test_with_nothing_unfinished_it_starts_silently_unless_asked_to_resume(capsys, monkeypatch):
    new = runs.Run(runs.fingerprint(NOW))
    resume.check(new, NOW)
    (left(WAS).folder / "last").mkdir()
    (runs.ROOT / "lock").touch()
    resume.check(new, NOW)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(resume.ASKED, "1")
    with pytest.raises(Refusal, match=r"no unfinished run in \.runs to resume; without PIPELINE_RESUME"):
        resume.check(new, NOW)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b'{"par')])
def test_a_run_that_does_not_tell_what_it_was_made_of_is_no_crash(capsys, damage):
    damage(left(WAS).folder / resume.MADE_OF)
    resume.check(runs.Run(runs.fingerprint(NOW)), NOW)
    assert "which would tell how, is missing or damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trainer_that_is_asked_to_resume_says_what_differs_and_leaves_all_as_it_is(tmp_path):
    project = tiny.Project(tmp_path / "project", num_epochs=2)
    assert project.run("pipeline.train").returncode == 0
    (run,) = (project.folder / ".runs").glob("*/train.jsonl")
    (run.parent / "last").rename(run.parent / "checkpoint-00000001")  # as if it had been interrupted
    project.set_params(train={"learning_rate": 0.5, "num_epochs": 1})
    loop = project.folder / "pipeline/loop.py"
    loop.write_text(loop.read_text() + "\n")
    before = {folder: listing(project.folder / folder) for folder in (run.parent, "models", "reports")}
    done = project.run("pipeline.train", PIPELINE_RESUME="1", OMP_NUM_THREADS="2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for line in (
        "pipeline/loop.py: changed",
        "params.train.learning_rate: was 0.01, is 0.5",
        "params.train.num_epochs: was 2, is 1",
        "numeric class threads: was 1, is 2",
    ):
        assert f"\n  {line}\n" in done.stderr
    assert done.stderr.count("\n  ") == 4
    assert {folder: listing(project.folder / folder) for folder in before} == before
    assert {entry.name for entry in (project.folder / ".runs").iterdir()} == {run.parent.name, "lock"}
    assert files.read_json(run.parent / "fingerprint.json")["params"]["train"]["num_epochs"] == 2
