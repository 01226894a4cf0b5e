import errno
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from pipeline import files, publication, publish, serving, stage, tracking
from pipeline.stage import Refusal
from tests import result


class View:
    """What MLflow holds."""

    def __init__(self):
        params = stage.load_params()["publish"]
        with tracking.problems(), tracking.alone():  # a follower may be making the experiment
            self.store = tracking.Store(params.experiment)
        self.client = self.store.client
        self.model = params.registered_model

    @property
    def runs(self):
        found = self.client.search_runs([self.store.experiment_id])
        return sorted(found, key=lambda run: run.info.start_time)

    def history(self, run):
        return {
            name: sorted((at.step, at.value) for at in self.client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
        }

    def artifacts(self, run, folder=""):
        for found in self.client.list_artifacts(run.info.run_id, folder):
            yield from self.artifacts(run, found.path) if found.is_dir else [found.path]

    @property
    def versions(self):
        found = self.client.search_model_versions(f"name = '{self.model}'")
        return sorted((version for version in found), key=lambda version: int(version.version))

    @property
    def challenger(self):
        return str(self.client.get_model_version_by_alias(self.model, "challenger").version)


def state(folder):
    """Every byte that MLflow keeps."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = list(database.iterdump())
    database.close()
    return rows, {
        str(path): path.read_bytes() for path in sorted((folder / "mlartifacts").rglob("*")) if path.is_file()
    }


def complete(view, run):
    """Assert that a run holds all that the files say, and nothing twice."""
    published = files.read_json(Path("reports/publication.json"))
    assert run.info.status == "FINISHED"
    assert run.info.run_name.endswith(f" | {published['publication'][:8]}")
    assert run.data.params == published["params"]
    points = tracking.points_of(files.read_jsonl(Path("reports/train.jsonl")))
    for every in view.history(run).values():
        assert len({step for step, _ in every}) == len(every)
    history = {name: points for name, points in view.history(run).items() if not name.startswith(tracking.SYSTEM)}
    for name in tracking.CURVES:
        assert history.pop(name) == sorted((step, value) for (key, step), value in points.items() if key == name)
    final = publication.final_metrics(files.read_json(Path("reports/evaluation.json")))
    assert history == {name: [(result.BEST_STEP, value)] for name, value in final.items()}
    datasets = {known.dataset.name: known for known in run.inputs.dataset_inputs}
    assert {name: known.dataset.digest for name, known in datasets.items()} == {
        side: about["digest"] for side, about in published["datasets"].items()
    }
    assert len(run.inputs.dataset_inputs) == 3
    assert [tag.value for tag in datasets["train"].tags] == ["training"]
    reports = {str(path) for path in Path("reports").rglob("*") if path.is_file()} - {"reports/publication.json"}
    assert set(view.artifacts(run)) == reports | {"samples.json"}
    assert [output.step for output in run.outputs.model_outputs] == [result.BEST_STEP]


def test_one_run_holds_everything(repository):
    result.publish_here()
    view = View()
    (run,) = view.runs
    complete(view, run)
    assert run.data.params["train.scratch.num_layers"] == str(stage.load_params()["train"].scratch.num_layers)
    assert run.data.metrics["test_loss"] == pytest.approx(5.4)
    assert run.data.metrics["validation_loss"] == pytest.approx(5.3)
    assert run.data.metrics["test_loss_ci95_low"] == 5.0
    assert run.data.metrics["baselines_test_unigram"] == 6.1
    assert run.data.tags["pipeline.verdict"] == "healthy"


def test_the_page_of_a_run_tells_verdict_losses_samples_and_the_way_back(repository, monkeypatch):
    result.publish_here()
    view = View()
    (run,) = view.runs
    assert run.info.run_name.startswith("first | ")
    text = run.data.tags["mlflow.note.content"]
    for part in (
        "**healthy**: Validation loss went down and levelled off.",
        "- Train longer.",
        "| **test** | 5.4 | 5 to 5.6 | 200.3 |",
        "| validation, word frequencies alone | 6.1 |",
        "> The old fox sleeps. It is so.",
        f"python -m pipeline.audit {run.info.run_id}",
    ):
        assert part in text, text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri())  # where it looks, whatever its client is for
    table = view.client.load_table(view.store.experiment_id, "samples.json", [run.info.run_id])
    assert list(table["prompt"]) == [text[:8] for text in result.TEXTS]
    assert (table["prompt"] + table["continuation"]).str.replace(r"\s+", " ", regex=True).iloc[0].endswith("It is so.")


def test_a_run_is_named_for_what_it_changed_against_the_champion(repository, monkeypatch):
    result.publish_here()
    view = View()
    view.client.set_registered_model_alias(view.model, "champion", "1")
    with result.edited(Path("params.yaml"), "temperature: 0.8", "temperature: 0.7"):
        result.publish_here()
    monkeypatch.setenv("DVC_EXP_NAME", "bold-name")
    files.write_text(Path("reports/samples.md"), "other")
    result.publish_here()
    names = [run.info.run_name.rpartition(" | ")[0] for run in view.runs]
    assert names == ["first", "temperature 0.8 -> 0.7", "bold-name: again"]
    text = view.runs[1].data.tags["mlflow.note.content"]
    assert "| `sample.temperature` | 0.8 | 0.7 |" in text and "champion (version 1)" in text


def test_a_champion_that_no_run_made_is_compared_with_nothing(repository):
    result.publish_here()
    view = View()
    by_hand = view.client.create_model_version(view.model, str(Path("models/best").resolve()))
    view.client.set_registered_model_alias(view.model, "champion", by_hand.version)
    with result.edited(Path("params.yaml"), "temperature: 0.8", "temperature: 0.7"):
        result.publish_here()
    assert view.runs[1].info.run_name.startswith("first | ")


def test_publishing_twice_changes_nothing(repository):
    result.publish_here()
    first, content = state(repository), Path("reports/publication.json").read_bytes()
    result.publish_here()
    publish.ensure()
    assert state(repository) == first
    assert Path("reports/publication.json").read_bytes() == content


def test_publication_is_a_function_of_the_files(repository, written, tmp_path, monkeypatch, database):
    result.publish_here()
    other = tmp_path / "other name"
    shutil.copytree(written, other)
    shutil.copy(database, other)
    monkeypatch.chdir(other)
    subprocess.run(["git", "init", "--quiet"], check=True)
    result.publish_here()
    content = Path("reports/publication.json").read_bytes()
    assert content == (repository / "reports" / "publication.json").read_bytes()
    assert str(tmp_path).encode() not in content


@pytest.mark.parametrize(
    "file", ["models/best/model.safetensors", "models/best/training.json", "reports/samples.md", "data/split/test.npy"]
)
def test_publication_changes_with_every_file(repository, file):
    def digest():
        params = {name: section.model_dump() for name, section in stage.load_params().items()}
        return publication.content(result.paths(), params)["publication"]

    before = digest()
    if file.endswith(".npy"):
        shutil.copy("data/split/validation.npy", file)
    elif file.endswith(".json"):
        files.write_json(Path(file), files.read_json(Path(file)) | {"step": 4})
    else:
        Path(file).write_bytes(Path(file).read_bytes() + b"x")
    assert digest() != before


def test_the_registered_model_is_the_evaluated_one_byte_for_byte(repository):
    result.publish_here()
    view = View()
    (version,) = view.versions
    assert str(version.version) == view.challenger == "1"
    assert version.tags["validation_loss"] == "5.3000" and "healthy" in version.description
    assert {"pipeline.verdict", "test_loss", "pipeline.fingerprint", "git.commit"} <= set(version.tags)
    model = view.client.get_logged_model(version.source.removeprefix("models:/"))
    folder = Path(url2pathname(urlparse(model.artifact_location).path))
    assert (folder / "data/best/model.safetensors").read_bytes() == Path("models/best/model.safetensors").read_bytes()
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".bin"}]
    for path in folder.rglob("*"):
        assert path.is_dir() or str(repository).encode() not in path.read_bytes()
    requirements = (folder / "requirements.txt").read_text().split()
    locked = (result.ROOT / "requirements.lock").read_text().lower().split()
    assert requirements and set(requirements) <= set(locked)


def test_a_version_tells_the_hashes_of_dvc_lock_what_goes_in_and_what_comes_out(repository):
    from mlflow.models import Model

    Path("dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  train:\n    outs:\n    - path: models/best\n      md5: ab.dir\n"
    )
    result.publish_here()
    view = View()
    (version,) = view.versions
    assert version.tags["dvc.lock.train"] == "models/best ab.dir"
    logged = view.client.get_logged_model(version.source.removeprefix("models:/"))
    folder = tracking.local_folder(logged.artifact_location)
    model = Model.load(str(folder))
    assert [str(schema.input_types()[0]) for schema in (model.signature.inputs, model.signature.outputs)] == (
        ["DataType.string"] * 2
    )
    assert {param.name: param.default for param in model.signature.params.params} == serving.DEFAULTS
    prompt = stage.load_params()["sample"].prompts[0]
    assert prompt in str(model.load_input_example(str(folder)))
    assert model.load_input_example_params(str(folder)) == serving.DEFAULTS


def test_mlflow_loads_the_model_in_both_flavours(repository, monkeypatch):
    result.publish_here()
    with tracking.problems():
        mlflow = tracking.load_mlflow()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri())
        uri = f"models:/{View().model}@challenger"
        answers = mlflow.pyfunc.load_model(uri).predict(["The old", "", "word " * 400], params={"max_new_tokens": 4000})
        pipeline = mlflow.transformers.load_model(uri)
    assert [answer.startswith(prompt) for answer, prompt in zip(answers, ["The old", "", "word " * 400], strict=True)]
    assert pipeline("The old", max_new_tokens=2)[0]["generated_text"].startswith("The old")


def test_a_live_run_is_completed_not_doubled(repository):
    view = View()
    live = view.store.create(result.FINGERPRINT)
    points = tracking.points_of(result.rows(7))
    view.store.add(
        live, points | {("curves/tokens_per_s", 3): 100.0}, {"train.seed": str(stage.load_params()["train"].seed)}
    )
    result.publish_here()
    (run,) = view.runs
    assert run.info.run_id == live.info.run_id
    del run.data.metrics["curves/tokens_per_s"]
    complete(view, run)


def test_a_restored_result_is_published_from_its_files(repository, written, database, tmp_path, monkeypatch):
    result.publish_here()
    content = Path("reports/publication.json").read_bytes()
    restored = tmp_path / "restored"  # as DVC does, in a clone
    shutil.copytree(written, restored)
    shutil.copy(database, restored)
    (restored / "mlruns" / "0").mkdir(parents=True)  # MLflow's own default would be the file store here
    (restored / "mlruns" / "0" / "meta.yaml").touch()
    monkeypatch.chdir(restored)
    Path("reports/publication.json").write_bytes(content)
    publish.ensure()
    view = View()
    (run,) = view.runs
    complete(view, run)
    assert view.challenger == "1"
    assert Path("reports/publication.json").read_bytes() == content


def test_files_that_are_not_the_published_ones_are_not_published(repository):
    result.publish_here()
    view = View()
    view.client.delete_run(view.runs[0].info.run_id)
    with result.edited(Path("reports/samples.md"), "samples", "changed"), pytest.raises(Refusal, match="dvc repro"):
        publish.ensure()
    assert view.runs == []
    publish.ensure()
    complete(view, view.runs[0])


def test_nothing_published_yet_is_one_sentence(repository):
    with pytest.raises(Refusal, match=r"no reports/publication\.json yet"):
        publish.ensure()


def test_another_result_with_the_same_model_is_another_run_of_the_same_version(repository):
    result.publish_here()
    with result.edited(Path("params.yaml"), "temperature: 0.8", "temperature: 0.7"):
        result.publish_here()
    view = View()
    assert len(view.runs) == 2 and len(view.versions) == 1
    outputs = [run.outputs.model_outputs[0].model_id for run in view.runs]
    assert outputs[0] == outputs[1]
    for run, temperature in zip(view.runs, ["0.8", "0.7"], strict=True):
        assert run.data.params["sample.temperature"] == temperature


def test_the_alias_follows_the_result_there_and_back(repository):
    result.publish_here()
    first = {
        path: path.read_bytes()
        for path in Path().rglob("*")
        if path.parts[0] in {"models", "reports"} and path.is_file()
    }
    tokenizer = files.read_json(Path("data/tokens/tokens.json"))["vocabulary_size"]
    result.write_model(Path("models/best"), Path("data/tokens/tokenizer"), tokenizer, seed=7)
    result.publish_here()
    view = View()
    assert (len(view.runs), len(view.versions), view.challenger) == (2, 2, "2")
    for path, content in first.items():
        path.write_bytes(content)
    publish.ensure()
    assert (len(view.runs), len(view.versions), view.challenger) == (2, 2, "1")


def test_a_run_tells_commit_changes_and_dvc_hashes(repository, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    Path("dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  train:\n    outs:\n    - path: models/best\n      md5: ab.dir\n"
    )
    git("init", "--quiet")
    git("add", "params.yaml", "dvc.lock")
    git("commit", "--quiet", "-m", "one")
    with Path("dvc.lock").open("a") as lock:
        lock.write("\n")
    monkeypatch.setenv("DVC_EXP_NAME", "bold-name")
    tags = publish.tags_of({"model_sha256": "x", "verdict": "y"})
    assert tags["git.commit"] == git("rev-parse", "HEAD") == tags["mlflow.source.git.commit"]
    assert tags["git.dirty"] == "false", "running writes dvc.lock; that is no change of the code"
    assert tags["dvc.lock.train"] == "models/best ab.dir"
    assert tags["dvc.experiment"] == "bold-name"
    files.write_text(Path("certificates/x.md"), "one\n")
    git("add", "certificates")
    git("commit", "--quiet", "-m", "a certificate")
    files.write_text(Path("certificates/x.md"), "another\n")
    assert publish.tags_of({"model_sha256": "x", "verdict": "y"})["git.dirty"] == "false", "nor is a replay"
    with Path("params.yaml").open("a") as params:
        params.write("\n")
    assert publish.tags_of({"model_sha256": "x", "verdict": "y"})["git.dirty"] == "true"


def test_publishing_contacts_nobody(repository, monkeypatch):
    def connect(_, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: connect(None, arguments))
    result.publish_here()
    time.sleep(0.2)  # telemetry would come from a thread of its own
    complete(View(), *View().runs)


def test_publishing_needs_no_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    tags = publish.tags_of({"model_sha256": "x", "verdict": "y"})
    assert tags["git.commit"] == tags["git.dirty"] == "unknown"
    assert not [key for key in tags if key.startswith("dvc.")]


def test_every_report_of_every_stage_is_published():
    stages = stage.read_stages(result.ROOT / "dvc.yaml")
    written = {
        path
        for name, definition in stages.items()
        if name != "publish"
        for path in stage.paths_of({key: value for key, value in definition.items() if key != "deps"}).values()
        if path.parts[0] == "reports"
    }
    assert set(publication.reports(stage.paths_of(stages["publish"]))) == written


def test_a_loss_that_is_not_finite_is_published_as_such(repository):
    evaluation = files.read_json(Path("reports/evaluation.json"))
    evaluation["test"] |= {"loss": None, "perplexity": None, "loss_ci95": [None, None]}
    files.write_json(Path("reports/evaluation.json"), evaluation)
    result.publish_here()
    view = View()
    (run,) = view.runs
    complete(view, run)
    assert "test_loss" not in run.data.metrics
    assert view.versions[0].tags["test_loss"] == "not finite"


def publish_twice_at_once():
    environment = os.environ | {"PYTHONPATH": str(result.ROOT)}
    command = [sys.executable, "-m", "pipeline.publish"]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    # The second waits for the first, which works in this checkout; if that takes long, it is refused by its name.
    assert [code for _, code in ended if code] in ([], [1])
    assert all("works in this checkout already" in said for said, code in ended if code)
    if any(code for _, code in ended):
        subprocess.run(command, env=environment, check=True)
    view = View()
    (run,) = view.runs
    complete(view, run)
    assert len(view.versions) == 1 and view.challenger == "1"


@pytest.mark.slow
def test_two_publications_at_once_make_one_run(repository):
    publish_twice_at_once()


class KilledError(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


WRITES = (
    "create_experiment", "create_run", "set_tag", "update_run", "log_batch", "log_inputs", "log_artifact",
    "log_artifacts", "log_dict", "create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model",
    "create_registered_model", "create_model_version", "set_registered_model_alias", "set_terminated",
)  # fmt: skip


def test_what_a_killed_publication_left_on_the_disk_goes_with_the_next(repository, monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    Path(".model.partial/model").mkdir(parents=True)
    Path(".model.partial/model/model.safetensors").write_bytes(b"half")
    result.publish_here()
    assert not Path(".model.partial").exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_a_killed_copy_left_among_the_files_of_a_run_goes_with_the_next(repository, monkeypatch):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def killed(*arguments):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        patch.setattr(LocalArtifactRepository, "_cleanup_staged_artifact", lambda *arguments: None)
        with pytest.raises(KilledError):
            result.publish_here()
    assert list(Path("mlartifacts").rglob(".artifact.uploading.*"))
    result.publish_here()
    assert not list(Path("mlartifacts").rglob(".artifact.uploading.*"))
    complete(View(), *View().runs)


@pytest.mark.slow
def test_a_publication_killed_at_any_write_is_completed_by_the_next(repository, database, monkeypatch):
    client = tracking.load_mlflow().MlflowClient
    originals = {name: getattr(client, name) for name in WRITES}
    left, calls = [0], []

    def counted(name):
        def call(*arguments, **keywords):
            calls.append(name)
            left[0] -= 1
            if left[0] == 0:
                raise KilledError(name)
            return originals[name](*arguments, **keywords)

        return call

    for name in WRITES:
        monkeypatch.setattr(client, name, counted(name))
    result.publish_here()
    assert set(calls) == set(WRITES)
    for number in range(1, len(calls) + 1):
        folder = repository.parent / f"killed at {number}"
        shutil.copytree(
            repository, folder, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "publication.json")
        )
        shutil.copy(database, folder)
        monkeypatch.chdir(folder)
        left[0] = number
        with pytest.raises(KilledError):
            result.publish_here()
        left[0] = 0
        result.publish_here()
        view = View()
        (run,) = view.runs
        complete(view, run)
        (version,) = view.versions
        assert view.challenger == str(version.version)
        logged = view.client.search_logged_models([view.store.experiment_id])
        assert [str(found.status) for found in logged] in (["READY"], ["LoggedModelStatus.READY"])
        before = state(folder)
        result.publish_here()
        assert state(folder) == before


def test_a_disk_that_fails_once_while_publishing_tidies_up_leaves_nothing_behind(repository, monkeypatch):
    inside, failed = os.rmdir, []

    def fail_once(path, **options):
        if path == "best" and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        inside(path, **options)

    monkeypatch.setattr(os, "rmdir", fail_once)
    result.publish_here()
    assert failed and not list(repository.glob(".*.partial"))
