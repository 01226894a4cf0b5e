"""Checkpoints: verified before anything is used, falling back to the one before, and never in training's way."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from chaos import campaign, project
from pipeline import files
from pipeline.checkpoints import STATE, TENSORS, Background, Checkpoint, Checkpoints
from pipeline.files import MANIFEST
from pipeline.runs import Run
from pipeline.stage import Refusal
from tests.closure import ROOT

INTERVAL = 10


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Run("0123456789abcdef")
    with made.opened():
        made.start_rows()
        yield made


def save(run: Run, step: int, best: int = 0) -> Checkpoints:
    """A row, and a checkpoint after it; a new best model too where its step is given."""
    checkpoints = Checkpoints(run.folder, run.rows_file, INTERVAL)
    run.add_row({"step": step})
    if best == step:
        files.write_json(checkpoints.best(step) / "weights", {"of": step})
    about_best = {"step": best, "sha256": files.sha256_of(checkpoints.best(best)) if best else None}
    tensors = {"weights": torch.full((3,), float(step))}
    checkpoints.write(Checkpoint(step, tensors, {"rows": run.rows_so_far(), "best": about_best}))
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*-*"))


def test_what_was_written_is_read(run):
    found = save(run, 10).newest()
    assert found.step == 10 and found.state["rows"] == run.rows_so_far()
    assert torch.equal(found.tensors["weights"], torch.full((3,), 10.0))
    assert sorted(path.name for path in (run.folder / "checkpoint-00000010").iterdir()) == [MANIFEST, STATE, TENSORS]


def test_none_is_none(run):
    assert Checkpoints(run.folder, run.rows_file, INTERVAL).newest() is None


@pytest.mark.parametrize("file", [TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["flipped", "cut", "zeroed", "deleted", "empty"])
def test_a_damaged_one_is_passed_over_with_a_word(run, file, damage, capsys):
    save(run, 10)
    checkpoints = save(run, 20)
    path = run.folder / "checkpoint-00000020" / file
    whole = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"flipped": flipped, "cut": whole[:middle], "zeroed": bytes(len(whole)), "empty": b""}[damage])
    assert checkpoints.newest().step == 10
    assert "checkpoint-00000020 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"../../x": "00"}', '{"/etc/passwd": "00"}', "[" * 10000])
def test_a_manifest_that_names_other_files_is_none(run, content):
    checkpoints = save(run, 10)
    (run.folder / "checkpoint-00000010" / MANIFEST).write_text(content)
    assert checkpoints.newest() is None


def test_rows_that_changed_before_the_checkpoint_damage_it(run):
    save(run, 10)
    checkpoints = save(run, 20)
    rows = run.rows_file.read_bytes()
    run.rows_file.write_bytes(rows.replace(b'{"step": 20}', b'{"step": 21}'))
    assert checkpoints.newest().step == 10
    run.rows_file.write_bytes(rows + b'{"step": 30}\n')  # what came after does not matter: it is cut
    assert checkpoints.newest().step == 20


def test_a_best_model_that_changed_damages_the_checkpoints_that_name_it(run):
    save(run, 10, best=10)
    checkpoints = save(run, 20, best=20)
    (checkpoints.best(20) / "weights").write_text("other")
    assert checkpoints.newest().step == 10


def test_the_newest_two_are_kept_and_the_newest_regular_one_and_the_models_they_name(run):
    for step, best in [(10, 10), (17, 10), (20, 20), (23, 20), (27, 20)]:
        save(run, step, best)
    assert names(run.folder) == ["best-00000020", "checkpoint-00000020", "checkpoint-00000023", "checkpoint-00000027"]


def test_a_damaged_one_takes_no_place_among_the_newest_two(run):
    for step in (10, 20, 25):
        save(run, step)
    (run.folder / "checkpoint-00000025" / STATE).write_text("{}")
    checkpoints = Checkpoints(run.folder, run.rows_file, INTERVAL)
    found = checkpoints.newest()
    for step in (30, 40):
        checkpoints.write(Checkpoint(step, found.tensors, found.state))
        assert len(names(run.folder)) == 2 and "checkpoint-00000025" not in names(run.folder)


def test_going_back_leaves_the_regular_one_however_often_it_was_interrupted(run):
    for step in (10, 20, 23, 27):
        checkpoints = save(run, step)
    checkpoints.go_back()
    assert checkpoints.newest().step == 20
    shutil.rmtree(run.folder / "checkpoint-00000020")
    save(run, 23).go_back()
    assert checkpoints.newest() is None


def test_a_full_disk_is_one_sentence_and_leaves_the_one_before(run, monkeypatch):
    checkpoints = save(run, 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.checkpoints.save_file", full)
    with pytest.raises(Refusal, match=r"checkpoint-00000020 could not be written.*No space left.*goes on from there"):
        save(run, 20)
    assert checkpoints.newest().step == 10
    assert names(run.folder) == ["checkpoint-00000010"]


def test_training_goes_on_while_something_is_written():
    background, begun, go = Background(), threading.Event(), threading.Event()

    def work():
        begun.set()
        assert go.wait(30)

    background.start(work)
    assert begun.wait(30)  # and this thread is not held up
    go.set()
    background.wait()


def test_what_failed_in_the_background_is_raised_at_the_next_occasion():
    background = Background()

    def fail():
        raise Refusal("disk full")

    background.start(fail)
    with pytest.raises(Refusal, match="disk full"):
        background.start(lambda: None)
    background.wait()  # raised once


def test_one_thing_is_written_at_a_time():
    background, order = Background(), []
    background.start(lambda: (time.sleep(0.05), order.append(1)))
    background.start(lambda: order.append(2))
    background.wait()
    assert order == [1, 2]


def finished(run: Run) -> None:
    for folder in (run.best, run.last):
        folder.mkdir()
        (folder / "weights").write_text(json.dumps(folder.name))
    run.add_row({"step": 1})
    run.finish()


def test_a_finished_run_is_finished_until_a_byte_of_it_changes(run, capsys):
    assert not run.finished
    finished(run)
    assert run.finished
    (run.best / "weights").write_text("other")
    assert not run.finished
    assert "are damaged; training again" in capsys.readouterr().out
    assert not run.finished and not capsys.readouterr().out


# Checkpoints that somebody wrote, with a manifest that fits


FORGED = {
    "a header of 2**60 bytes": (TENSORS, (2**60).to_bytes(8, "little") + b"{}"),
    "no header": (TENSORS, b"\x02\0\0\0\0\0\0\0[]"),
    "a deep state": (STATE, b"[" * 100_000),
    "a state of another kind": (STATE, b"[]"),
    "a state of megabytes": (STATE, b'{"a":"' + b"x" * 5_000_000),
    "rows without end": (STATE, b'{"step": 20, "rows": {"num_bytes": 1152921504606846976, "sha256": ""}}'),
    "a best model elsewhere": (
        STATE,
        b'{"step": 20, "rows": {"num_bytes": 0, "sha256": "%s"}, "best": {"step": "../../x", "sha256": ""}}'
        % hashlib.sha256().hexdigest().encode(),
    ),
}


@pytest.mark.parametrize(("name", "content"), FORGED.values(), ids=FORGED)
def test_a_forged_checkpoint_is_passed_over_and_stops_no_later_one(run, name, content):
    save(run, 10)
    checkpoints = save(run, 20)
    folder = run.folder / "checkpoint-00000020"
    (folder / name).write_bytes(content)
    files.write_json(folder / MANIFEST, {each: files.sha256_of(folder / each) for each in (TENSORS, STATE)})
    found = checkpoints.newest()
    assert found is not None and found.step == 10
    save(run, 15)  # what goes on from step 10 may be interrupted before it comes to 20 again
    found = checkpoints.newest()
    assert found is not None and found.step == 15


SAVING = """
import torch
from pipeline.checkpoints import Checkpoint, Checkpoints
from pipeline.runs import Run
run = Run("0123456789abcdef")
with run.opened():
    run.start_rows()
    run.add_row({"step": 10})
    state = {"rows": run.rows_so_far(), "best": {"step": 0, "sha256": None}}
    Checkpoints(run.folder, run.rows_file, 10).write(Checkpoint(10, {"weights": torch.ones(3)}, state))
"""


def test_everything_is_on_disk_before_the_folder_has_its_name_and_the_manifest_comes_last(tmp_path):
    """Power may fail, which no kill of a process can show: the calls themselves, noted by the campaign's library."""
    library = campaign.compiled(tmp_path)
    if library is None:
        pytest.skip("the fault library needs Linux and a C compiler (cc)")
    work = tmp_path / "work"
    files.write_text(work / "saving.py", SAVING)
    noted = project.trace(library, work, tmp_path / "log.txt")
    environment = os.environ | noted | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-m", "saving"], cwd=work, env=environment, check=True)
    run = work / ".runs/0123456789abcdef"
    lines = [line.split(" ", 3)[2:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    calls = [(call, os.path.relpath(path, run)) for call, path in lines]

    beside, named = ".checkpoint-00000010.partial", calls.index(("rename", "checkpoint-00000010"))
    assert calls[named - 1] == ("fsync", beside) and calls[named + 1] == ("fsync", ".")
    synced = {name: calls.index(("fsync", f"{beside}/{name}")) for name in (STATE, TENSORS, MANIFEST)}
    written = {name: calls.index(("rename", f"{beside}/{name}")) for name in (STATE, MANIFEST)}
    assert max(synced.values()) < named
    assert written[MANIFEST] > synced[TENSORS] and written[MANIFEST] > written[STATE]
    assert calls[written[STATE] - 1] == ("fsync", f"{beside}/.{STATE}.partial")
    assert calls.index(("fsync", "train.jsonl")) > calls.index(("write", "train.jsonl"))
