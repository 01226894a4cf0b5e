import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import page, summary
from tests import result


def run_summary(**environment):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.summary"],
        env=os.environ | {"PYTHONPATH": str(result.ROOT)} | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def test_about_ten_lines_say_what_came_out(repository, monkeypatch, capsys):
    result.publish_here()
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "100")
    summary.main()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert 7 <= len(printed.out.splitlines()) <= 11
    for word in ("5.300", "200.300", "5.400", "6.100", "healthy", "Train longer.", "The old fox sleeps. It is so.",
                 "models/best", "make ui", "dvc metrics diff", "dvc plots show", "docs/guide.md#healthy"):  # fmt: skip
        assert word in printed.out


@pytest.mark.slow
def test_a_result_that_dvc_restored_is_published(repository, database):
    result.publish_here()
    shutil.copy(database, "mlflow.db")
    shutil.rmtree("mlartifacts")
    assert run_summary().returncode == 0
    subprocess.run(
        [sys.executable, "-c", "from tests.test_publish import *; view = View(); complete(view, *view.runs)"],
        env=os.environ | {"PYTHONPATH": str(result.ROOT)}, check=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_result_is_shown_even_if_mlflow_is_out_of_reach(repository):
    result.publish_here()
    done = run_summary(MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "healthy" in done.stdout
    assert "cannot be used" in done.stderr and "Traceback" not in done.stderr


def test_nothing_run_yet_is_one_sentence(repository):
    Path("reports/samples.jsonl").unlink()
    done = run_summary()
    assert done.returncode == 1
    assert done.stderr == "summary: there is no reports/samples.jsonl yet; run `dvc repro`\n"


def test_a_sample_is_one_line_of_the_given_width():
    assert page.one_line("one\ntwo\t three", 20) == "one two three"
    assert page.one_line("word " * 50, 12) == "word word w…"


def test_numbers_that_are_not_finite_have_a_word():
    side = {"loss": None, "perplexity": None}
    diagnosis = {"verdict": "diverged", "advice": [], "guide": "g"}
    text = "\n".join(summary.lines({"validation": side, "test": side}, diagnosis, [], "m", 80))
    assert text.count("not finite") == 4


def test_one_sample_each_of_the_first_prompts_is_shown():
    samples = [{"prompt": p, "text": f"{p}{i}"} for p in "abcd" for i in range(3)]
    assert [sample["text"] for sample in page.one_a_prompt(samples)] == ["a2", "b2", "c2"]
