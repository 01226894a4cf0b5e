"""A replay: each outcome, each refusal, and nothing of it left behind. Its stages copy `answers` instead of training.

tests/test_end_to_end.py replays a real training.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import audit, certificate, commits, files, inputs, recipe, replay, stage, tracking, worktree
from pipeline.certificate import IDENTICAL, NOT_REPRODUCED, WITHIN, File
from pipeline.follow import is_running
from pipeline.pedigree import outputs_of
from pipeline.registry import MODEL_SHA256
from pipeline.stage import Refusal
from tests.result import ROOT, edited
from tests.test_audit import (
    MODEL,
    broken,
    client,
    committed_and_published,
    copy_of,
    git,
    moved_away,
    records,
    run,
    tagged,
)

STUB = """import shutil
from pathlib import Path

for path in {deps}:
    assert Path(path).exists(), path
for path in map(Path, {outs}):
    path.parent.mkdir(exist_ok=True)
    (shutil.copytree if Path("answers", path).is_dir() else shutil.copyfile)(Path("answers", path), path)
"""
SLEEPER = """import subprocess, time
from pathlib import Path

follower = subprocess.Popen(["sleep", "100"], start_new_session=True)
Path("../started").write_text(str(follower.pid))
time.sleep(100)
"""


@pytest.fixture(scope="module")
def made(written, database, tmp_path_factory):
    """A published result whose stages, run again, write what they wrote."""

    def prepare():
        for name in (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
            files.write_text(Path(name), (ROOT / name).read_text())
        definitions = stage.read_stages()
        for name in ("train", "sample", "evaluate"):
            definition = definitions[name]
            written_by = {kind: definition.get(kind, []) for kind in ("outs", "metrics")}
            outs = [str(path) for path in stage.paths_of(written_by).values()]
            deps = [path for path in definition["deps"] if not path.endswith((".py", ".lock"))]
            files.write_text(Path("pipeline", f"{name}.py"), STUB.format(deps=deps, outs=outs))
            for path in map(Path, outs):
                Path("answers", path).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, Path("answers", path))

    folder = tmp_path_factory.mktemp("replay") / "made, it's"
    with committed_and_published(written, database, folder, prepare):
        yield folder


@contextlib.contextmanager
def committed(path, old, new):
    """A commit in which a file is another one, for a while."""
    try:
        with edited(Path(path), old, new):
            git("commit", "--quiet", "--all", "-m", "another")
            yield git("rev-parse", "HEAD")
    finally:
        git("reset", "--quiet", "--hard", "HEAD~1")


def again(**named):
    """Replay the result, as `main` does once it knows which."""
    known = records()
    return replay.replay(known, recipe.one_result(known, run().info.run_id), 1e-3, **named)


def work_trees():
    """Those that git knows and those that are there, this checkout aside."""
    known = git("worktree", "list", "--porcelain").count("worktree ") - 1
    return known, sorted(path.name for path in worktree.ROOT.glob("*") if path.is_dir())


def short():
    return run().data.tags[tracking.PUBLICATION][:8]


# --- the outcomes --------------------------------------------------------------------------------------------------


def folder_of(folder, **texts):
    for name, text in texts.items():
        files.write_text(folder / "models" / name, text)
    return folder


def recorded_of(**texts):
    return {f"models/{name}": hashlib.md5(text.encode()).hexdigest() for name, text in texts.items()}


def test_files_with_the_recorded_bytes_are_byte_identical_whatever_else_is_known(tmp_path):
    compared = certificate.compare(recorded_of(a="1", b="2"), folder_of(tmp_path, a="1", b="2"), ["models"])
    assert [file.path for file in compared if file.agrees] == ["models/a", "models/b"]
    assert certificate.judge(compared, None, 0) == (IDENTICAL, "all 2 files have the bytes that were recorded")


def test_a_byte_a_file_that_is_missing_and_a_file_too_many_are_differences(tmp_path):
    compared = certificate.compare(recorded_of(a="1", b="2"), folder_of(tmp_path, a="x", c="3"), ["models"])
    assert [file.path for file in compared if not file.agrees] == ["models/a", "models/b", "models/c"]
    assert compared[1].replayed is None and compared[2].recorded is None


def test_a_folder_whose_files_nobody_knows_is_compared_as_a_whole(tmp_path):
    md5 = inputs.md5_of(folder_of(tmp_path, a="1") / "models")
    (whole,) = certificate.compare({"models": md5}, tmp_path, ["models"])
    assert whole.agrees
    (whole,) = certificate.compare({"models": md5}, folder_of(tmp_path, a="2"), ["models"])
    assert not whole.agrees


@pytest.mark.parametrize(
    ("difference", "outcome", "said"),
    [
        (
            9e-4,
            WITHIN,
            "the test losses differ by 0.0009 nats a token (0.001 is allowed); rows is the first of 2 files",
        ),
        (-1e-3, WITHIN, "differ by 0.001 nats"),
        (-2e-3, NOT_REPRODUCED, "rows is the first of 2 files that differ (of 3), and the test losses differ by 0.002"),
        (None, NOT_REPRODUCED, "there are no two test losses"),
        (float("nan"), NOT_REPRODUCED, "rows is the first"),
    ],
)
def test_other_bytes_are_judged_by_the_test_loss_and_the_first_file_is_named(difference, outcome, said):
    compared = [File("tokens", "1", "1"), File("rows", "1", "2"), File("model", "1", None)]
    found, why = certificate.judge(compared, difference, 1e-3)
    assert found == outcome
    assert said in why


def test_what_differs_between_the_environments_is_listed(tmp_path):
    for name, threads in (("then", 2), ("now", 1)):
        about = {"numeric_class": {"threads": threads, "libraries": {"torch": "2.13.0"}}}
        files.write_json(tmp_path / f"{name}.json", about)
        files.write_text(tmp_path / f"{name}.lock", f"# {name}\n")
    then, now = (
        certificate.environment(tmp_path / f"{name}.json", tmp_path / f"{name}.lock") for name in ("then", "now")
    )
    locked = f"# a comment==1\nnumpy==1.0\npsutil=={psutil.__version__}\nno-such-package==1.0\n"
    assert certificate.differences(then, now, locked) == [
        "numeric class threads: was 2, is 1",
        "requirements.lock: changed",
        f"package numpy: was 1.0, is {importlib.metadata.version('numpy')}",
        "package no-such-package: was 1.0, is not there",
    ]
    assert certificate.differences(then, then, "") == []
    nothing = certificate.environment(None, tmp_path / "no.lock")
    assert "numeric class threads: was not there, is 2" in certificate.differences(nothing, then, "")


# --- which result, which commit ------------------------------------------------------------------------------------


def test_an_id_leads_to_one_result(here):
    for name in ("HEAD", "train", "models:/gpt2-pipeline@challenger", run().info.run_id):
        assert recipe.one_result(records(), name).info.run_id == run().info.run_id
    with pytest.raises(Refusal, match="'nothing' is no commit, no stage"):
        recipe.one_result(records(), "nothing")


def test_an_id_that_leads_to_several_results_or_to_none_that_is_whole_is_refused(here):
    tags = run().data.tags | {tracking.PUBLICATION: "f" * 64, "mlflow.runName": "twin"}
    ours, twin = run().info.run_id, client().create_run(run().info.experiment_id, tags=tags).info.run_id
    client().log_param(twin, "publish.registered_model", MODEL)
    try:
        with pytest.raises(Refusal, match=f"{twin}: publishing its result did not come to its end"):
            recipe.one_result(records(), twin)
        client().set_terminated(twin)
        assert recipe.one_result(records(), "HEAD").info.run_id == ours, "the one that registered the model of both"
        client().set_tag(twin, MODEL_SHA256, "0" * 64)
        with pytest.raises(Refusal, match=f"HEAD leads to 2 results; name one of them: run {ours} .*, run {twin} "):
            recipe.one_result(records(), "HEAD")
    finally:
        client().delete_run(twin)


def test_a_commit_that_git_does_not_have_is_refused(here):
    with tagged(git_commit="0" * 40), pytest.raises(Refusal, match="git has no commit 000"):
        again()


def test_a_commit_with_other_parameters_is_refused_key_by_key(here):
    with committed("params.yaml", "learning_rate: 2e-3", "learning_rate: 1e-3") as other, tagged(git_commit=other):
        said = "(?s)has other parameters:\n  train.learning_rate: 0.001 in the commit, 0.002 in the run$"
        with pytest.raises(Refusal, match=said):
            again()


def test_a_result_of_a_work_tree_with_changes_is_replayed_where_they_were_committed(here):
    made_by, recorded_by = git("rev-parse", "HEAD~"), git("rev-parse", "HEAD")
    with tagged(git_dirty="true"):
        assert recipe.commit_of(records(), run()) == made_by, "what was changed is no part of the result"
    slower = committed("params.yaml", "learning_rate: 2e-3", "learning_rate: 1e-3")
    with slower as other, tagged(git_dirty="true", git_commit=other):
        assert recipe.commit_of(records(), run()) == recorded_by


def test_a_result_of_changes_that_nobody_committed_is_refused(here):
    loop = commits.tree("HEAD")["pipeline/loop.py"]
    git("reset", "--quiet", "--soft", "HEAD~")
    try:
        with edited(Path("dvc.lock"), commits._md5_of_blob(loop), "f" * 32):
            for dirty, had in (("true", "had changes"), ("unknown", "may have had changes")):
                with (
                    tagged(git_dirty=dirty),
                    pytest.raises(Refusal, match=f"the work tree {had} when it was published"),
                ):
                    recipe.commit_of(records([{"id": "x", "tags": {}}]), run())
    finally:
        git("reset", "--quiet", "--soft", "ORIG_HEAD")


# --- which stages, which data --------------------------------------------------------------------------------------


def test_what_runs_again_is_train_and_what_follows_from_it_on_the_data_that_the_others_left(here):
    stages, outputs = stage.read_stages(), outputs_of(run())
    names, given = recipe.plan(stages, outputs)
    assert names == ["train", "sample", "evaluate"]
    assert sorted(given) == ["data/split", "data/tokens", "reports/leakage.json"]
    with pytest.raises(Refusal, match="no tag of the run names the outputs of stage sample"):
        recipe.plan(stages, {name: outs for name, outs in outputs.items() if name != "sample"})
    with pytest.raises(Refusal, match="has no stage evaluate"):
        recipe.plan({name: stages[name] for name in ("split", "train")}, outputs)


def test_the_data_are_restored_byte_for_byte_or_refused(here, tmp_path):
    _, given = recipe.plan(stage.read_stages(), outputs_of(run()))
    recipe.restore(records(), given, tmp_path)
    assert {path: inputs.md5_of(tmp_path / path) for path in given} == given
    for path in ("data/split", "data/tokens/tokens.bin"):
        with broken(copy_of(path)), pytest.raises(Refusal, match=f"DVC's copy of {path}, was changed"):
            recipe.restore(records(), given, tmp_path)
    with moved_away(copy_of(path)), pytest.raises(Refusal, match=f"DVC no longer has {path}"):
        recipe.restore(records(), given, tmp_path)


@pytest.mark.slow
def test_data_that_the_cache_lost_come_from_a_remote(here, tmp_path):
    _, given = recipe.plan(stage.read_stages(), outputs_of(run()))
    shutil.copytree(".dvc/cache", tmp_path / "remote")
    lost, config = copy_of("data/tokens/tokens.bin"), Path(".dvc/config.local")
    config.write_text(f"[core]\n    remote = there\n['remote \"there\"']\n    url = {tmp_path / 'remote'}\n")
    lost.chmod(0o644)
    lost.unlink()
    try:
        recipe.restore(records(), given, tmp_path / "restored")
        assert inputs.md5_of(tmp_path / "restored" / "data/tokens") == given["data/tokens"]
    finally:
        config.unlink()
        shutil.copyfile(tmp_path / "remote" / lost.relative_to(".dvc/cache"), lost)


# --- the work tree -------------------------------------------------------------------------------------------------


def test_a_work_tree_is_gone_in_the_end_unless_it_is_to_be_kept(here):
    with worktree.of("HEAD", "one") as tree:
        assert (tree.folder / "params.yaml").read_bytes() == Path("params.yaml").read_bytes()
        assert work_trees() == (1, ["one"])
    assert work_trees() == (0, [])
    with pytest.raises(ZeroDivisionError), worktree.of("HEAD", "one") as tree:
        tree.keep = True
        _ = 1 / 0
    assert work_trees() == (0, [])
    with worktree.of("HEAD", "one") as tree:
        tree.keep = True
    with worktree.of("HEAD", "two"):
        assert work_trees() == (2, ["one", "two"])
    with worktree.of("HEAD~", "one") as tree:
        assert not (tree.folder / "dvc.lock").exists(), "made anew"
    assert work_trees() == (0, [])
    assert git("status", "--porcelain") == ""


def test_a_second_replay_of_a_result_is_refused_while_the_first_one_lasts(here):
    with worktree.of("HEAD", "one"), worktree.of("HEAD", "two"):
        already = pytest.raises(Refusal, match=rf"process {os.getpid()} works in \.replay/one already")
        with already, worktree.of("HEAD", "one"):
            pass
        assert work_trees() == (2, ["one", "two"])


def test_the_work_tree_of_a_killed_replay_is_removed_at_the_next_start(here):
    if not (child := os.fork()):
        with contextlib.suppress(BaseException), worktree.of("HEAD", "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.waitpid(child, 0)
    assert work_trees() == (1, ["killed"])
    with worktree.of("HEAD", "next"):
        assert work_trees() == (1, ["next"])


def test_a_commit_without_dvc_is_refused_for_dvc_would_work_in_the_checkout(here, tmp_path):
    with pytest.raises(Refusal, match=r"has no folder \.dvc"):
        worktree.WorkTree(tmp_path).dvc("repro")


# --- all of it, with DVC -------------------------------------------------------------------------------------------


def state():
    """All that a replay must leave as it is."""
    cache = {path: path.stat().st_mtime_ns for path in Path(".dvc/cache").rglob("*")}
    outputs = {
        path: path.stat().st_mtime_ns for name in ("data", "models", "reports") for path in Path(name).rglob("*")
    }
    experiment = client().search_experiments()[0].experiment_id
    known = [dict(one.data.tags) | one.data.metrics for one in client().search_runs([experiment])]
    return cache, outputs, known, git("status", "--porcelain"), Path("dvc.lock").read_bytes()


@pytest.mark.slow
def test_a_replay_of_the_same_bytes_is_certified_and_leaves_everything_as_it_was(here, capfd):
    before = state()
    found = again()
    assert state() == before and work_trees() == (0, [])
    assert re_run(capfd) == ["train", "sample", "evaluate"]
    assert found["outcome"] == IDENTICAL
    assert found["commit"] == git("rev-parse", "HEAD~") and found["run"] == run().info.run_id
    loss = files.read_json(Path("reports/evaluation.json"))["test"]["loss"]
    assert found["losses"]["test_loss"] == {"recorded": loss, "replayed": loss, "difference": 0}
    paths = [file["path"] for file in found["files"]]
    assert paths[0].startswith("data/tokens/") and "data/split/train.npy" in paths
    assert paths.index("reports/train.jsonl") < paths.index("models/best/model.safetensors")
    assert paths.index("models/last/model.safetensors") < paths.index("reports/samples.md")
    assert found["files"][-1]["path"] == "models/best (pipeline.model_sha256)"

    written = certificate.write({"asked": "HEAD", "versions": ["models:/m/1"], **found})
    try:
        assert json.loads(written.with_suffix(".json").read_text())["files"] == found["files"]
        text = written.read_text()
        for word in (f"# Replay of {short()}: byte-identical", found["commit"], "models:/m/1", "reports/train.jsonl"):
            assert word in text
        assert text.endswith("|\n") and str(Path.cwd()) not in text
        assert git("status", "--porcelain") == "?? certificates/", "evidence to be committed"
    finally:
        shutil.rmtree("certificates")


def re_run(capfd):
    return [line.split("'")[1] for line in capfd.readouterr().out.splitlines() if line.startswith("Running stage '")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "old", "new", "outcome", "said"),
    [
        (
            "answers/models/best/training.json",
            '"step": 8',
            '"step": 9',
            WITHIN,
            "models/best/training.json is the first",
        ),
        (
            "answers/reports/evaluation.json",
            '"loss": 5.3',
            '"loss": 5.4',
            NOT_REPRODUCED,
            "reports/evaluation.json is the",
        ),
        ("pipeline/train.py", "/train.jsonl", "/train.txt", None, "failed in .replay/"),
    ],
)
def test_code_that_makes_other_bytes_is_told_from_code_that_makes_another_model(
    here, monkeypatch, capfd, path, old, new, outcome, said
):
    monkeypatch.setattr("sys.argv", ["replay", "models:/gpt2-pipeline@challenger"])
    monkeypatch.setattr(audit, "ask_prefect", list)  # the flows are not here
    with committed(path, old, new) as other, tagged(git_commit=other):
        if outcome == WITHIN:
            replay.main()
        else:
            with pytest.raises(SystemExit) as ended:
                replay.main()
            assert ended.value.code == 1
    assert work_trees() == ((1, [short()]) if outcome == NOT_REPRODUCED else (0, []))
    shown = capfd.readouterr()
    assert said in (shown.out if outcome == WITHIN else shown.err)
    if outcome:
        assert files.read_json(certificate.ROOT / f"{short()}.json")["outcome"] == outcome
        assert "of 1 files that differ" in (certificate.ROOT / f"{short()}.md").read_text()
        shutil.rmtree(certificate.ROOT)
        with worktree.of("HEAD", short()):
            pass


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running_and_no_work_tree(here):
    started = worktree.ROOT / "started"

    def interrupt():
        while not started.exists() or not started.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    text = Path("pipeline/train.py").read_text()
    with committed("pipeline/train.py", text, SLEEPER) as other, tagged(git_commit=other):
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            again()
    follower = int(started.read_text())
    started.unlink()
    assert work_trees() == (0, [])
    assert not psutil.pid_exists(follower) or not is_running(psutil.Process(follower))
    below = psutil.Process().children(recursive=True)
    assert not [child for child in below if is_running(child) and "repro" in child.cmdline()]
