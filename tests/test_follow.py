import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipeline import follow, machine, reaper, tracking
from pipeline.tail import Tail
from tests import result
from tests.test_publish import View, complete

NAME = result.FINGERPRINT[: tracking.NUM_FINGERPRINT_DIGITS]


@pytest.fixture
def folder(repository, monkeypatch):
    """The folder of a training that has just begun."""
    monkeypatch.setattr(follow, "INTERVAL_S", 0.1)
    monkeypatch.setattr(machine, "INTERVAL_S", 0.3)
    folder = repository / ".runs" / NAME
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def trainer():
    """A process that stands for the trainer; it ends when its input does."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def end(trainer):
    trainer.communicate(b"\n")


def following(folder, trainer):
    thread = threading.Thread(target=follow.follow, args=(folder, psutil.Process(trainer.pid)))
    thread.start()
    return thread


def wait_for(condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("this never came true")


def lengths(view):
    """How many points of the loss each run holds."""
    return [len(view.history(run).get("curves/loss", [])) for run in view.runs]


def test_only_whole_new_lines_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    tail = Tail(file)
    assert tail.new_rows() == []
    file.write_text('{"step": 1}\n{"st')
    assert tail.new_rows() == [{"step": 1}]
    assert tail.new_rows() == []
    with file.open("a") as rows:
        rows.write('ep": 2}\n')
    assert tail.new_rows() == [{"step": 2}]


@pytest.mark.parametrize("kept", [0, 13, 26])
@pytest.mark.parametrize("regrown", [0, 1, 3, 9])
def test_a_file_that_was_cut_and_grew_again_loses_no_row(tmp_path, kept, regrown):
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"step": step}) + "\n" for step in range(10, 13)]
    file.write_text("".join(rows))
    tail = Tail(file)
    tail.new_rows()
    other = "".join(json.dumps({"step": step, "more": 1}) + "\n" for step in range(20, 20 + regrown))
    file.write_text("".join(rows)[:kept] + other)
    seen = [row["step"] for _ in range(3) for row in tail.new_rows()]
    assert set(range(20, 20 + regrown)) <= set(seen)


def test_curves_are_live_and_published_once(folder, trainer):
    rows = result.rows()
    (folder / "train.jsonl").write_text(result.jsonl(rows[:5]))
    (folder / "timing.jsonl").write_text('{"step": 3, "tokens_per_s": 99.5}\n')
    follower = following(folder, trainer)
    view = View()
    wait_for(lambda: lengths(view) == [4])
    (live,) = view.runs
    assert live.info.status == "RUNNING"
    assert live.data.metrics["curves/tokens_per_s"] == 99.5
    wait_for(lambda: "system/cpu_utilization_percentage" in view.runs[0].data.metrics)
    found = view.runs[0].data.metrics
    assert found["system/system_memory_usage_megabytes"] > 0 and 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert live.data.params["train.max_length"] == "128"
    with (folder / "train.jsonl").open("a") as file:
        file.write(result.jsonl(rows[5:8]))
    wait_for(lambda: lengths(view) == [7])
    with (folder / "train.jsonl").open("a") as file:
        file.write(result.jsonl(rows[8:]))
    (folder / "last").mkdir()
    end(trainer)
    follower.join()
    assert lengths(view) == [12]
    assert view.runs[0].info.status == "RUNNING", "publishing will finish it"
    result.publish_here()
    (run,) = view.runs
    assert run.info.run_id == live.info.run_id
    del run.data.metrics["curves/tokens_per_s"]
    complete(view, run)


def test_an_interrupted_training_is_killed_and_taken_up_again(folder, trainer):
    rows = result.rows()
    (folder / "train.jsonl").write_text(result.jsonl(rows[:9]))
    follower = following(folder, trainer)
    view = View()
    wait_for(lambda: lengths(view) == [8])
    end(trainer)
    follower.join()
    assert view.runs[0].info.status == "KILLED"

    # Resuming cuts the file to the checkpoint and writes the same rows again.
    (folder / "train.jsonl").write_text(result.jsonl(rows[:6]))
    second = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    follower = following(folder, second)
    wait_for(lambda: view.runs[0].info.status == "RUNNING")
    (folder / "train.jsonl").write_text(result.jsonl(rows))
    wait_for(lambda: lengths(view) == [12])
    (folder / "last").mkdir()
    end(second)
    follower.join()
    result.publish_here()
    (run,) = view.runs
    complete(view, run)


def test_a_training_that_ends_before_its_first_row_has_no_run(folder, trainer):
    follower = following(folder, trainer)
    time.sleep(0.5)
    end(trainer)
    follower.join(20)
    assert not follower.is_alive() and View().runs == []


def test_a_training_that_is_published_already_is_not_followed_again(folder, trainer):
    result.publish_here()
    (folder / "train.jsonl").write_text(result.jsonl(result.rows()))
    follower = following(folder, trainer)
    follower.join(20)
    assert not follower.is_alive()
    view = View()
    (run,) = view.runs
    complete(view, run)


def test_publishing_while_it_is_followed_writes_every_point_once(folder, trainer):
    (folder / "train.jsonl").write_text(result.jsonl(result.rows()[:6]))
    follower = following(folder, trainer)
    view = View()
    wait_for(lambda: lengths(view) == [5])
    (folder / "train.jsonl").write_text(result.jsonl(result.rows()))
    (folder / "last").mkdir()
    result.publish_here()
    end(trainer)
    follower.join()
    (run,) = view.runs
    complete(view, run)


def test_runs_that_a_crash_left_are_ended(folder, trainer):
    view = View()
    crashed = view.store.create("feedfeed")
    view.store.add(crashed, tags={reaper.OWNER: dead()})
    elsewhere = view.store.create("beefbeef")
    view.store.add(elsewhere, tags={reaper.OWNER: "another-machine 999999999 1"})
    (folder / "last").mkdir()
    (folder / "train.jsonl").write_text(result.jsonl(result.rows()[:1]))
    follower = following(folder, trainer)
    wait_for(lambda: len(view.runs) == 3)
    end(trainer)
    follower.join()
    assert [run.info.status for run in view.runs] == ["KILLED", "RUNNING", "RUNNING"]


def dead():
    return f"{os.uname().nodename} 999999999 1"


@pytest.mark.parametrize("start", ["a publication", "a training that is published already"])
def test_runs_that_a_crash_left_are_ended_by_the_next_start_of_any_kind(folder, trainer, start):
    if start != "a publication":
        result.publish_here()
    view = View()
    crashed = view.store.create("feedfeed")
    mine = view.store.create("beefbeef")
    view.store.add(crashed, tags={reaper.OWNER: dead()})
    if start == "a publication":
        result.publish_here()
    else:
        (folder / "train.jsonl").write_text(result.jsonl(result.rows()))
        follower = following(folder, trainer)
        follower.join(20)
        assert not follower.is_alive()
    found = {run.info.run_id: run.info.status for run in view.runs}
    assert found.pop(crashed.info.run_id) == "KILLED"
    assert found.pop(mine.info.run_id) == "RUNNING", "its owner, this process, is alive"
    assert list(found.values()) == ["FINISHED"]


def test_a_run_has_its_owner_from_the_beginning(repository):
    tag = View().store.create("feedfeed").data.tags[reaper.OWNER]
    assert tag == reaper.tag_of(psutil.Process()) and not reaper.is_gone(tag)
    host, pid, start_s = tag.split()
    assert reaper.is_gone(f"{host} {pid} {int(start_s) - 100}"), "an id that was given again"


def test_after_any_number_of_restarts_every_point_is_there_once(folder):
    with tracking.problems():
        before = follow.Live(NAME, "elsewhere 0 1")
        for attempt in range(1, 6):
            rows = tracking.points_of(result.rows(2 * attempt))
            # Resuming repeats steps, at another speed; and the follower of the attempt before may be late.
            late, now = (
                rows | {("curves/tokens_per_s", step): speed for step in range(1, 2 * attempt + 1)}
                for speed in (attempt - 0.5, float(attempt))
            )
            live = follow.Live(NAME, f"elsewhere {attempt} 1")
            before.send(late, {})
            live.send(now, {})
            before = live
    view = View()
    (run,) = view.runs
    history = view.history(run)
    history = {name: points for name, points in history.items() if not name.startswith(tracking.SYSTEM)}
    assert history.pop("curves/tokens_per_s") == [(step, float((step + 1) // 2)) for step in range(1, 11)]
    for name, points in history.items():
        assert points == sorted((step, value) for (key, step), value in rows.items() if key == name)


def test_with_a_store_out_of_reach_it_ends_with_the_training_and_publishing_has_everything(
    folder, trainer, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(follow, "RETRY_S", 0.1)
    (folder / "train.jsonl").write_text(result.jsonl(result.rows()))
    # The process that wrote the first of these was killed while it wrote.
    (folder / "timing.jsonl").write_text(
        '{"step": 2, "tok{"step": 3, "tokens_per_s": 9}\n{"step": 4, "tokens_per_s": 8}\n'
    )
    follower = following(folder, trainer)
    wait_for((folder / "machine.jsonl").exists)
    end(trainer)
    follower.join(30)
    assert not follower.is_alive()
    assert "cannot be used" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result.publish_here()
    view = View()
    (run,) = view.runs
    assert view.history(run)["curves/tokens_per_s"] == [(4, 8.0)]
    (measured,) = view.client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")[:1]
    first = json.loads((folder / "machine.jsonl").read_text().splitlines()[0])
    assert (measured.step, measured.timestamp) == (first["step"], first["time_ms"])
    del run.data.metrics["curves/tokens_per_s"]
    complete(view, run)


@pytest.mark.slow
def test_the_process_ends_with_the_trainer_however_that_ends(folder, trainer):
    (folder / "train.jsonl").write_text(result.jsonl(result.rows()[:4]))
    command = [sys.executable, "-m", "pipeline.follow", str(folder), str(trainer.pid)]
    environment = os.environ | {"PYTHONPATH": str(result.ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    view = View()
    wait_for(lambda: lengths(view) == [3])
    assert psutil.Process(process.pid).nice() >= 10
    trainer.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and output == ""
    assert view.runs[0].info.status == "KILLED"


def test_a_trainer_that_is_gone_already_is_no_fault(folder):
    command = [sys.executable, "-m", "pipeline.follow", str(folder), "999999999"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(result.ROOT)}, check=True)
