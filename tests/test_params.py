"""What a wrong params.yaml does: one message that names every fault, before any work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import stage
from pipeline.stage import Refusal
from tests.closure import ROOT

GOOD = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(text, key, line):
    """The text with the line of `key` replaced; comments stay."""
    text, count = re.subn(rf"^( +){key}:[^#\n]*", rf"\g<1>{line} ", text, count=1, flags=re.MULTILINE)
    assert count == 1, f"params.yaml has no {key}"
    return text


def refusal(text):
    Path("params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Refusal) as caught:
        stage.load_params()
    return str(caught.value)


def faults(text):
    """The lines of the refusal after its heading, which counts them."""
    heading, *lines = refusal(text).splitlines()
    count = f"{len(lines)} fault" + "s" * (len(lines) > 1)
    assert heading == f"params.yaml has {count}, nothing was run:"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def test_the_committed_file_is_accepted():
    Path("params.yaml").write_text(GOOD, encoding="utf-8")
    assert stage.load_params()["train"].learning_rate > 0


@pytest.mark.parametrize(
    ("written", "value"), [("3e-4", 0.0003), ("3E-4", 0.0003), ("1e0", 1.0), ("1", 1.0), ("2.5e-05", 2.5e-5)]
)
def test_a_number_in_scientific_notation_is_a_number_as_for_dvc(written, value):
    Path("params.yaml").write_text(put(GOOD, "learning_rate", f"learning_rate: {written}"))
    assert stage.load_params()["train"].learning_rate == value


def test_a_byte_order_mark_and_windows_line_ends_change_nothing():
    Path("params.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    with_them = stage.load_params()
    Path("params.yaml").write_text(GOOD)
    assert {key: value.model_dump() for key, value in with_them.items()} == {
        key: value.model_dump() for key, value in stage.load_params().items()
    }


def test_sections_are_frozen():
    Path("params.yaml").write_text(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        stage.load_params()["train"].seed = 2


@pytest.mark.parametrize(
    ("key", "line", "message"),
    [
        ("num_epochs", "num_epoch: 6", "train.num_epochs: missing; add it"),
        ("num_epochs", "num_epoch: 6", "train.num_epoch: unknown key (value 6); remove it or mend its name"),
        ("num_epochs", "num_epochs: six", "train.num_epochs: should be a valid integer; got 'six'"),
        ("num_epochs", "num_epochs: '6'", "train.num_epochs: should be a valid integer; got '6'"),
        ("num_epochs", "num_epochs: 6.0", "train.num_epochs: should be a valid integer; got 6.0"),
        ("num_epochs", "num_epochs: true", "train.num_epochs: should be a valid integer; got True"),
        ("num_epochs", "num_epochs: [6]", "train.num_epochs: should be a valid integer; got [6]"),
        ("num_epochs", "num_epochs:", "train.num_epochs: should be a valid integer; got None"),
        ("learning_rate", "learning_rate: fast", "train.learning_rate: should be a valid number; got 'fast'"),
        ("learning_rate", "learning_rate: '2e-3'", "train.learning_rate: should be a valid number; got '2e-3'"),
        ("learning_rate", "learning_rate: -1", "train.learning_rate: should be greater than 0; got -1"),
        ("learning_rate", "learning_rate: .nan", "train.learning_rate: should be a finite number; got nan"),
        ("learning_rate", "learning_rate: .inf", "train.learning_rate: should be a finite number; got inf"),
        ("schedule", "schedule: cosin", "train.schedule: should be 'linear' or 'cosine'; got 'cosin'"),
        ("isolate_documents", "isolate_documents: 1", "train.isolate_documents: should be a valid boolean; got 1"),
        ("isolate_documents", "isolate_documents: no", "train.isolate_documents: should be a valid boolean; got 'no'"),
        ("base", "base: 2024", "model.base: should be text; got 2024: put it in quotes"),
    ],
)
def test_a_fault_is_told_with_its_key_its_value_and_what_would_be_right(key, line, message):
    assert message in faults(put(GOOD, key, line))


def test_an_unknown_key_inside_a_group_is_named_by_its_whole_path():
    text = put(GOOD, "num_heads", "num_heads: 4\n    heads: 3")
    assert faults(text) == ["train.scratch.heads: unknown key (value 3); remove it or mend its name"]


def test_a_long_value_is_told_shortened():
    (fault,) = faults(put(GOOD, "base", f"base: [{', '.join('x' * 500)}]"))
    assert len(fault) < 150


def test_values_that_contradict_each_other_are_told_together():
    text = put(put(GOOD, "embedding_size", "embedding_size: 190"), "num_heads", "num_heads: 4")
    text = put(put(text, "min_characters", "min_characters: 999999"), "max_characters", "max_characters: 1000")
    clean, train = faults(text)
    assert clean.startswith("clean: ") and "999999" in clean and "1000" in clean
    assert train.startswith("train.scratch: ") and "190" in train and "4" in train


def test_missing_and_unknown_sections_are_named():
    text = GOOD.replace("\npublish:", "\npublishing:")
    assert faults(text) == [
        "publish: missing section",
        "publishing: unknown section; known: ingest, clean, model, split, tokenize, train, sample, evaluate, publish",
    ]


@pytest.mark.parametrize("written", ["", " null", " yes", " [a, b]", " 3"])
def test_a_section_without_keys_is_refused(written):
    text = GOOD[: GOOD.index("\npublish:")] + f"\npublish:{written}\n"
    (fault,) = faults(text)
    assert fault.startswith("publish: should hold keys, indented below it; got ")


def test_the_faults_of_all_sections_are_told_at_once():
    text = GOOD.replace("\npublish:", "\npublishing:")  # two: one section missing, one unknown
    text = put(text, "num_epochs", "num_epoch: 6")  # two: one key missing, one unknown
    text = put(text, "learning_rate", "learning_rate: -1")
    text = put(text, "min_characters", "min_characters: few")
    text = put(text, "embedding_size", "embedding_size: 191")
    text = put(text, "validation_fraction", "validation_fraction: 1.5")
    text = put(text, "max_new_tokens", "max_new_tokens: 0")
    told = faults(text)
    assert sorted(fault.partition(":")[0] for fault in told) == [
        "clean.min_characters",
        "publish",
        "publishing",
        "sample.max_new_tokens",
        "split.validation_fraction",
        "train.learning_rate",
        "train.num_epoch",
        "train.num_epochs",
        "train.scratch",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "params.yaml is empty"),
        ("# only a comment\n", "params.yaml is empty"),
        ("- a\n- b\n", "should hold sections .* not only \\['a', 'b'\\]"),
        ("hello\n", "should hold sections .* not only 'hello'"),
        (GOOD.replace("  demo_documents", "\tdemo_documents"), "not valid YAML: line \\d+, column 1: .*'\\\\t'"),
        (put(GOOD, "base", "base: [scratch"), "not valid YAML: line \\d+, column \\d+: expected"),
        (put(GOOD, "num_epochs", "seed: 6"), "not valid YAML: line \\d+, column 3: found duplicate key .seed."),
        (GOOD + "\nmodel:\n  base: gpt2\n", "not valid YAML: .* duplicate key"),
        (put(GOOD, "base", "base: *nothing"), "not valid YAML: .* undefined alias"),
        (put(GOOD, "base", "base: !!python/object:os.system x"), "not valid YAML: .*python/object"),
        (put(GOOD, "base", "base: 2024-13-45"), "not valid YAML: month"),
        (GOOD + "\n---\na: 1\n", "not valid YAML: .* another document"),
        (GOOD + "\n{a: b}: 2\n", "not valid YAML|unknown section"),
        (GOOD + "\n12: 2\n", "12: unknown section"),
        (GOOD + "\0", "not valid YAML: .*x0000"),
        ("a: " + "[" * 1500, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_yaml_or_no_mapping_is_refused_in_a_few_words(text, message):
    told = refusal(text)
    assert re.search(message, told)
    assert len(told.splitlines()) < 5


def test_bytes_that_are_not_utf8_are_refused():
    Path("params.yaml").write_bytes(GOOD.encode() + b"# caf\xe9\n")
    with pytest.raises(Refusal, match=r"params\.yaml is not valid YAML: 'utf-8'"):
        stage.load_params()


def test_a_missing_file_is_refused_with_the_way_back():
    with pytest.raises(Refusal, match=r"no params\.yaml in .*git checkout params\.yaml"):
        stage.load_params()


def run(module):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", f"pipeline.{module}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["ingest", "publish"])
def test_a_stage_with_wrong_params_ends_with_one_message_and_exit_code_1_and_writes_nothing(folder, module):
    text = put(put(GOOD, "num_epochs", "num_epochs: -6"), "max_new_tokens", "max_new_tokens: many")
    Path("params.yaml").write_text(text)
    before = sorted(folder.rglob("*"))
    ended = run(module)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        f"{module}: params.yaml has 2 faults, nothing was run:",
        "  train.num_epochs: should be greater than or equal to 1; got -6",
        "  sample.max_new_tokens: should be a valid integer; got 'many'",
    ]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("params.yaml", None, "split: no params.yaml in "),
        ("dvc.yaml", None, "split: no dvc.yaml in "),
        ("params.yaml", "a: [", "split: params.yaml is not valid YAML: "),
        ("dvc.yaml", "stages:", "split: dvc.yaml has no stages"),
        ("dvc.yaml", "stages: {other: {cmd: x}}", "split: dvc.yaml has no stage split; it has other"),
    ],
)
def test_whatever_is_wrong_with_the_files_there_is_no_traceback(folder, file, text, message):
    (folder / "params.yaml").write_text(GOOD)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    ended = run("split")
    assert ended.returncode == 1
    assert ended.stderr.startswith(message)
    assert len(ended.stderr.splitlines()) == 1
