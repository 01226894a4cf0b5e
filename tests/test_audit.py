"""Each of the five leads to the other four, everything agrees in what a run leaves, and every broken link is named."""

import contextlib
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import agreement, audit, files, inputs, publish, recorded, registry, stage, tracking
from pipeline.pedigree import LOCKED, VERDICT, Records
from pipeline.stage import Refusal
from tests import result
from tests.result import edited

MODEL = "gpt2-pipeline"  # the name of the experiment, too
CACHE = Path(".dvc/cache")
FLOW_RUN = "01234567-89ab-cdef-0123-456789abcdef"


def git(*arguments):
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def lock_here(without=()):
    """Write dvc.lock, and what DVC would keep in its cache, for the files that are here; formats as in `recorded`."""

    def entry(path):
        md5 = inputs.md5_of(path)
        at = recorded.object_path(CACHE, md5)
        at.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            for file in (file for file in path.rglob("*") if file.is_file()):
                entry(file)
            at.write_bytes(inputs.listing_of(path, (file for file in path.rglob("*") if file.is_file())))
        else:
            shutil.copy(path, at)
        return {"path": path.as_posix(), "hash": "md5", "md5": md5}

    stages = {}
    for name, definition in stage.read_stages().items():
        if name not in without:
            outs = [one for kind in ("outs", "metrics") for one in definition.get(kind, [])]
            paths = [Path(one if isinstance(one, str) else next(iter(one))) for one in outs]
            stages[name] = {
                "cmd": definition["cmd"],
                "deps": [entry(Path(dep)) for dep in definition["deps"]],
                "outs": [entry(path) for path in paths],
            }
    YAML().dump({"schema": "2.0", "stages": stages}, Path("dvc.lock"))


@contextlib.contextmanager
def committed_and_published(written, database, folder, prepare):
    """A repository with the result of a clean commit, published, and a later commit that records its dvc.lock.

    `prepare` adds what else shall be in it, once stages and data have their stand-ins.
    """
    shutil.copytree(written, folder)
    shutil.copy(database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        for definition in stage.read_stages().values():
            for path in map(Path, definition["deps"]):
                if path.suffix == ".py":
                    files.write_text(path, f"# {path}\n")
        for name in ("data/source/mine.txt", "data/raw/a", "data/clean/a", "models/last/model.safetensors"):
            files.write_text(Path(name), name)
        prepare()
        git("init", "--quiet")
        git("add", "--all")
        git("commit", "--quiet", "-m", "code and parameters")
        lock_here(without=("publish",))
        result.publish_here()
        lock_here()
        git("add", "--all")
        git("commit", "--quiet", "-m", "dvc.lock")
        yield folder


@pytest.fixture(scope="module")
def made(written, database, tmp_path_factory):
    def prepare():
        files.write_text(Path(".gitignore"), "data\nmodels\nreports\nmlflow.db*\nmlartifacts\n.dvc\n.runs\n")

    folder = tmp_path_factory.mktemp("audit") / "made, it's"
    with committed_and_published(written, database, folder, prepare):
        yield folder


def flow_runs(**tags):
    named = files.read_json(Path("reports/publication.json"))["publication"]
    ours = {"git.commit": git("rev-parse", "HEAD~"), "git.dirty": "false", "pipeline.publication": named}
    return [{"id": FLOW_RUN, "name": "old-fox", "state": "Completed", "tags": ours | tags}]


def records(of_flow=None):
    with tracking.problems():
        return Records(CACHE, MODEL, of_flow or flow_runs())


def client():
    return tracking.reader()


def run():
    experiment = client().get_experiment_by_name(MODEL)
    (found,) = client().search_runs([experiment.experiment_id])
    return found


def version():
    (found,) = client().search_model_versions()
    return found


def faults(of_flow=None):
    """What an audit of everything says, besides what `verify` says."""
    with tracking.problems():
        return list(dict.fromkeys(audit.all_faults(records(of_flow), MODEL)))


def only(found, *words):
    """Whether there is one fault, with these words."""
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], found
    return True


# --- what belongs together -----------------------------------------------------------------------------------------


def test_everything_agrees_in_what_a_run_leaves(here):
    assert faults() == []


def test_each_of_the_five_leads_to_the_other_four(here):
    made_by, recorded_by = git("rev-parse", "HEAD~"), git("rev-parse", "HEAD")
    ids = [made_by, made_by[:12], recorded_by, "HEAD", *(name for name in recorded.read_lock())]
    ids += [run().info.run_id, f"models:/{MODEL}/1", f"models:/{MODEL}@challenger", FLOW_RUN]
    known = records()
    for name in ids:
        (found,) = audit.runs_named(known, name)
        assert found.info.run_id == run().info.run_id, name
    assert list(audit.faults_around(known, [found])) == []
    shown = "\n".join(audit.lines(known, found))
    version = f"models:/{MODEL}/1  @challenger"
    for word in (made_by, recorded_by[:12], "this checkout", run().info.run_id, version, FLOW_RUN):
        assert word in shown
    for name, locked in recorded.read_lock().items():
        for out in locked["outs"]:
            assert (f"{out['path']} {out['md5'][:8]}" in shown) == (name != "publish")


def test_what_dvc_alone_ran_has_no_flow_run(here):
    assert "flow run  none: Prefect did not run it" in list(audit.lines(records([{"id": "x", "tags": {}}]), run()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-thing", r"'no-such-thing' is no commit, no stage of dvc\.lock \(ingest, .*\), no published run"),
        ("0" * 32, "is no commit"),
        ("models:/gpt2-pipeline/7", r"no models:/gpt2-pipeline/7; it has models:/gpt2-pipeline/1, models:/gpt2-p"),
        ("models:/gpt2-pipeline@champion", r"no models:/gpt2-pipeline@champion; it has"),
        ("models:/other/1", "it has no model 'other'"),
        ("01234567-0000-0000-0000-456789abcdef", "Prefect knows no flow run"),
        ("HEAD~2", "is no commit"),
    ],
)
def test_an_id_that_leads_nowhere_is_refused(here, name, said):
    with pytest.raises(Refusal, match=said):
        audit.runs_named(records(), name)


def test_a_flow_run_without_a_result_and_a_commit_without_one_are_refused(here):
    failed = [{"id": FLOW_RUN, "name": "x", "state": "Failed", "tags": {"git.commit": git("rev-parse", "HEAD")}}]
    with pytest.raises(Refusal, match=r"\(Failed\) did not come to a result"):
        audit.runs_named(records(failed), FLOW_RUN)
    git("commit", "--quiet", "--allow-empty", "-m", "a third")
    try:
        with edited(Path("dvc.lock"), "path: reports/clean.json", "path: reports/klean.json"):
            git("commit", "--quiet", "--all", "-m", "another dvc.lock")
            with pytest.raises(Refusal, match="HEAD: an orphan: MLflow holds no result of it"):
                audit.runs_named(records(), "HEAD")
    finally:
        git("reset", "--quiet", "--hard", "HEAD~2")


# --- broken links: git ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tagged(**tags):
    """Other tags of the run, for a while; `_` stands for the dot, None for no tag."""
    before = run()
    for name, value in ((name.replace("_", ".", 1), value) for name, value in tags.items()):
        if value is None:
            client().delete_tag(before.info.run_id, name)
        else:
            client().set_tag(before.info.run_id, name, value)
    try:
        yield
    finally:
        for name in (name.replace("_", ".", 1) for name in tags):
            client().set_tag(before.info.run_id, name, before.data.tags[name])


def with_version(name, value):
    if value is None:
        client().delete_model_version_tag(version().name, str(version().version), name)
    else:
        client().set_model_version_tag(version().name, str(version().version), name, value)


@contextlib.contextmanager
def version_tagged(name, value):
    """Another tag of the version, or none, for a while."""
    before = version().tags.get(name)
    with_version(name, value)
    try:
        yield
    finally:
        with_version(name, before)


def test_a_commit_that_git_does_not_have_is_named(here):
    with tagged(git_commit="0" * 40):
        found = faults()
    assert any(f"run {run().info.run_id} ({run().info.run_name}): git has no commit 000" in fault for fault in found)
    assert any("its tag git.commit is not that of run" in fault for fault in found)
    assert only(faults(flow_runs(**{"git.commit": "1" * 40})), f"flow run {FLOW_RUN}: git has no commit 111")


def test_a_commit_with_other_parameters_is_named_unless_the_work_tree_had_changes(here):
    with edited(Path("params.yaml"), "learning_rate: 2e-3", "learning_rate: 1e-3"):
        git("commit", "--quiet", "--all", "-m", "slower")
        other = git("rev-parse", "HEAD")
    try:
        with tagged(git_commit=other), version_tagged("git.commit", other):
            was = "train.learning_rate is 0.001 there, 0.002 here"
            assert only(faults(), f"params.yaml of commit {other} has other parameters ({was})")
        with tagged(git_commit=other, git_dirty="true"), version_tagged("git.commit", other):
            assert faults() == []
        assert only(faults(flow_runs(**{"git.commit": other})), f"flow run {FLOW_RUN}: params.yaml of commit", was)
    finally:
        git("reset", "--quiet", "--hard", "HEAD~1")


def test_a_commit_with_other_code_than_dvc_lock_names_is_named(here):
    with edited(Path("pipeline/loop.py"), "#", "##"):
        git("commit", "--quiet", "--all", "-m", "another loop")
        other = git("rev-parse", "HEAD")
    try:
        with tagged(git_commit=other), version_tagged("git.commit", other):
            assert only(faults(), f"commit {other} is not the code that dvc.lock names", "(pipeline/loop.py)")
    finally:
        git("reset", "--quiet", "--hard", "HEAD~1")
    with edited(Path("pipeline/serving.py"), "#", "##"):  # of publish alone: it makes no result
        git("commit", "--quiet", "--all", "-m", "another answer")
        other = git("rev-parse", "HEAD")
    try:
        with tagged(git_commit=other), version_tagged("git.commit", other):
            assert faults() == []
    finally:
        git("reset", "--quiet", "--hard", "HEAD~1")


# --- broken links: DVC ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def broken(path):
    """A file with another byte at its end, then without it, for a while."""
    before = path.read_bytes()
    path.chmod(0o644)
    try:
        path.write_bytes(before + b"x")
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def moved_away(path):
    """A file or folder that is not there, for a while."""
    aside = path.rename(path.with_name("aside"))
    try:
        yield
    finally:
        aside.rename(path)


def copy_of(path):
    return recorded.object_path(CACHE, inputs.md5_of(Path(path)))


@pytest.mark.parametrize(
    "path", ["data/raw", "reports/train.jsonl", "reports/diagnostics.json", "models/best/model.safetensors"]
)
def test_an_object_of_dvc_that_changed_or_went_is_named(here, path):
    with broken(copy_of(path)):
        assert any(f"DVC's copy of {path}, was changed" in fault for fault in faults())
    with moved_away(copy_of(path)):
        assert only(faults(), f"run {run().info.run_id}", f"DVC no longer has {path}; `dvc fetch")


def test_outputs_that_a_run_names_and_dvc_lock_does_not_are_named(here):
    with edited(Path("dvc.lock"), inputs.md5_of(Path("models/last")), inputs.md5_of(Path("data/raw"))):
        assert only(faults(), f"dvc.lock: run {run().info.run_id}", "names other outputs of stage train")
    text, best = run().data.tags["dvc.lock.train"], inputs.md5_of(Path("models/best"))
    with tagged(**{"dvc_lock.train": text.replace(best, inputs.md5_of(Path("data/raw")))}):
        said = "models/best of dvc.lock is not the model that its tag pipeline.model_sha256 names"
        assert any(said in fault for fault in faults())
    with tagged(**{"dvc_lock.train": None}):
        assert any("no tag of it names models/best of dvc.lock" in one for one in faults())
    with tagged(**{"dvc_lock.train": "no digest"}):
        assert any("DVC no longer has no" in one for one in faults())


def test_another_report_in_the_place_of_one_is_named(here):
    text, md5 = run().data.tags["dvc.lock.evaluate"], inputs.md5_of
    other = text.replace(md5(Path("reports/evaluation.json")), md5(Path("reports/leakage.json")))  # it has no losses
    with tagged(**{"dvc_lock.evaluate": other}):
        assert any("its artifact reports/evaluation.json is not the file of dvc.lock" in fault for fault in faults())


def test_a_dvc_lock_of_which_nothing_is_published_is_named(here):
    with edited(Path("dvc.lock"), "path: reports/publication.json", "path: reports/other.json"):
        assert only(faults(), "dvc.lock: it names no reports/publication.json")
    with broken(copy_of("reports/publication.json")):
        assert only(faults(), "dvc.lock: ", "DVC's copy of reports/publication.json, is changed")
    with moved_away(Path("dvc.lock")):
        assert only(faults(), "dvc.lock: it names no reports/publication.json")


# --- broken links: MLflow ------------------------------------------------------------------------------------------


def test_a_result_that_mlflow_does_not_hold_is_named(here):
    of_ours = flow_runs()
    client().delete_run(before := run().info.run_id)
    try:
        found = faults(of_ours)
    finally:
        client().restore_run(before)
    named = of_ours[0]["tags"]["pipeline.publication"][:8]
    assert len(found) == 3
    assert any(f"dvc.lock: no run of MLflow holds its result {named}" in fault for fault in found)
    assert any(f"models:/gpt2-pipeline/1: an orphan: MLflow has no published run {before}" in one for one in found)
    assert any(f"flow run {FLOW_RUN}: an orphan: no run of MLflow holds its result {named}" in one for one in found)


def test_without_a_database_nothing_is_created_and_everything_is_an_orphan(here):
    of_ours = flow_runs()
    with moved_away(Path("mlflow.db")):
        found = faults(of_ours)
        assert not Path("mlflow.db").exists()
    assert [fault.split(":")[0] for fault in found] == ["dvc.lock", f"flow run {FLOW_RUN}"]


def test_a_publication_that_was_cut_off_is_named(here):
    client().update_run(run().info.run_id, status="RUNNING")
    try:
        assert any("publishing it did not come to its end (RUNNING)" in fault for fault in faults())
    finally:
        client().update_run(run().info.run_id, status="FINISHED")


@pytest.mark.parametrize("path", ["reports/evaluation.json", "reports/curves/training.csv"])
def test_a_report_in_mlflow_that_changed_or_went_is_named(here, path):
    (artifacts,) = Path("mlartifacts").glob("*/artifacts")
    shown = "reports/curves" if "curves" in path else path
    with broken(artifacts / path):
        assert only(faults(), f"run {run().info.run_id}", f"its artifact {shown} is not the file of dvc.lock")
    with moved_away(artifacts / shown):
        assert only(faults(), f"its artifact {shown} is missing")


def test_a_version_of_another_model_or_result_than_its_run_is_named(here):
    for name in (tracking.PUBLICATION, "git.commit"):
        with version_tagged(name, "0" * 40):
            assert only(faults(), "models:/gpt2-pipeline/1", f"its tag {name} is not that of run")
    with version_tagged(registry.MODEL_SHA256, "0" * 64):
        found = faults()
    assert any(f"its tag {registry.MODEL_SHA256} is not that of run" in fault for fault in found)


@pytest.mark.parametrize(
    ("tag", "was", "by_hand"),
    [
        (tracking.FINGERPRINT, result.FINGERPRINT, result.FINGERPRINT[:-1]),
        (VERDICT, "healthy", "overfitting"),
        ("validation_loss", "5.3000", "5.2000"),
        ("test_loss", "5.4000", "not finite"),
        ("test_loss", "5.4000", None),
        ("dvc.lock.more", None, "models/more 0123"),
    ],
)
def test_a_tag_of_a_version_that_somebody_changed_is_named_with_both_values(here, tag, was, by_hand):
    with version_tagged(tag, by_hand):
        said = f"its tag {tag} is not that of run {run().info.run_id}"
        values = f"({was or 'nothing'} there, {by_hand or 'nothing'} here)"
        assert only(faults(), "models:/gpt2-pipeline/1: ", said, values)


def test_an_output_in_a_tag_of_a_version_that_somebody_changed_is_named_with_both_values(here):
    text, best = version().tags["dvc.lock.train"], inputs.md5_of(Path("models/best"))
    with version_tagged("dvc.lock.train", text.replace(best, "0123")):
        values = f"(models/best {best} there, models/best 0123 here)"
        assert only(faults(), "models:/gpt2-pipeline/1: its tag dvc.lock.train is not that of run", values)


def test_a_version_from_before_versions_named_outputs_agrees(here):
    with database_kept():
        for tag in (tag for tag in version().tags if tag.startswith(LOCKED)):
            with_version(tag, None)
        assert faults() == []


@pytest.mark.parametrize(
    ("tag", "was", "by_hand"),
    [(VERDICT, "healthy", "overfitting"), (tracking.FINGERPRINT, result.FINGERPRINT[:16], "f" * 16)],
)
def test_a_tag_of_a_run_that_somebody_changed_is_named_with_both_values(here, tag, was, by_hand):
    with tagged(**{tag.replace(".", "_"): by_hand}):
        said = f"its tag {tag} is not what its files say ({was} there, {by_hand} here)"
        assert only(faults(), f"run {run().info.run_id}", said)


@pytest.mark.parametrize("loss", [5.43215, None])
def test_a_loss_is_expected_as_publish_writes_it(here, loss):
    told = files.read_json(Path("reports/publication.json"))
    losses = {"validation": loss, "test": loss}
    assert publish.model_of(told | {"losses": losses}, result.paths()).tags["test_loss"] == agreement.as_tag(loss)


def test_a_model_with_other_bytes_than_its_version_says_is_named(here):
    (folder,) = Path("mlartifacts/models").glob("*/artifacts")
    weights = folder / "data" / "best" / "model.safetensors"
    with broken(weights):
        assert only(faults(), "models:/gpt2-pipeline/1: ", f"{weights}: publish: changed")
    # Somebody replaced the model, and renewed manifest and tag beside it.
    model_id = version().source.removeprefix("models:/")
    with broken(weights), broken(folder / files.MANIFEST):
        manifest = {path.relative_to(folder).as_posix(): files.sha256_of(path) for path in files.listing(folder)}
        del manifest[files.MANIFEST]
        files.write_json(folder / files.MANIFEST, manifest)
        before = client().get_logged_model(model_id).tags[registry.MANIFEST_SHA256]
        client().set_logged_model_tags(model_id, {registry.MANIFEST_SHA256: files.sha256_of(folder / files.MANIFEST)})
        found = faults()
        client().set_logged_model_tags(model_id, {registry.MANIFEST_SHA256: before})
    assert only(found, "models:/gpt2-pipeline/1: ", "holds another model than its tags say")
    assert faults() == []


def test_bytes_that_are_registered_twice_and_a_version_that_somebody_made_are_named(here, monkeypatch):
    name, run_id, tags, source = version().name, run().info.run_id, version().tags, version().source
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri())  # where MLflow looks for models:/
    with database_kept():
        client().create_model_version(name, source, run_id=run_id, tags=tags)
        client().create_model_version(name, source, run_id=run_id)
        found = faults()
    assert any(f"models:/{name}/2: version 1 claims the same bytes" in fault for fault in found)
    assert any(f"models:/{name}/3: an orphan: it has no tag pipeline.model_sha256" in fault for fault in found)
    assert len(found) == 2


@contextlib.contextmanager
def database_kept():
    """The database as it was, afterwards; through SQLite, for MLflow has it open."""
    connected = contextlib.closing
    with connected(sqlite3.connect("mlflow.db")) as now, connected(sqlite3.connect(":memory:")) as before:
        now.backup(before)
        try:
            yield
        finally:
            before.backup(now)


def test_a_run_without_a_version_a_model_without_one_and_a_run_that_names_nothing_are_named(here):
    name = version().name
    with database_kept():
        stray = client().create_run(run().info.experiment_id, run_name="by hand").info.run_id
        client().set_terminated(stray)
        assert only(faults(), f"run {stray} (by hand): an orphan: it is FINISHED, but names no result")
        client().delete_run(stray)
        client().delete_model_version(name, "1")
        found = faults()
    assert [fault for fault in found if f"no version of {name!r} holds its model" in fault]
    assert [fault for fault in found if re.match(r"logged model m-\w+: an orphan", fault)]
    assert len(found) == 2
    assert faults() == []


def test_a_result_that_two_runs_hold_is_named(here):
    before = run()
    with database_kept():
        tags = before.data.tags | {"mlflow.runName": "twin"}
        twin = client().create_run(before.info.experiment_id, tags=tags).info.run_id
        client().set_terminated(twin)
        found = faults()
    first = f"run {before.info.run_id} ({before.info.run_name})"
    assert any(f"{first}: run {twin} (twin) holds the same result" in fault for fault in found)


def test_a_version_whose_model_was_deleted_is_named(here):
    with database_kept():
        client().delete_logged_model(version().source.removeprefix("models:/"))
        assert only(faults(), "models:/gpt2-pipeline/1: ", "in MLflow: publish: missing")
