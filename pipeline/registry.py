"""The model in MLflow: logged once, registered once, found by the SHA-256 of its bytes.

The files of models/best are copied as they are, so what is served is byte for byte what was evaluated, and no
weights pass through memory. A logged model has two flavours: `python_function` (serving.py, which caps prompts and
answers) and `transformers` (`mlflow.transformers.load_model` gives a pipeline).
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files, serving
from pipeline.files import MANIFEST
from pipeline.stage import Refusal
from pipeline.tracking import Store, drop_half_copies, local_folder, reader, unless_gone, uri

ALIAS = "challenger"
MODEL_SHA256, MANIFEST_SHA256 = "pipeline.model_sha256", "pipeline.manifest_sha256"
BESIDE = Path(".model.partial")  # one place, so what a killed publication left there is removed by the next
REQUIREMENTS = ("mlflow", "numpy", "pandas", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Model:
    """What is registered."""

    registered_model: str
    folder: Path  # a Hugging Face folder
    sha256: str
    step: int
    tags: Mapping[str, str]
    description: str
    prompt: str  # an example of an input


def registered(store: Store, name: str, sha256: str) -> Any | None:
    """The newest version with these bytes, or None."""
    return next(iter(_versions(store.client, name, sha256)), None)


def _versions(client: Any, name: str, sha256: str) -> list[Any]:
    """All versions with these bytes, the newest first."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{MODEL_SHA256}` = '{sha256}'")
    return sorted(found, key=lambda version: -int(version.version))


def is_current(store: Store, name: str, sha256: str) -> bool:
    """Whether these bytes are registered and the alias points at them."""
    version = registered(store, name, sha256)
    return version is not None and _aliases(store, name).get(ALIAS) == str(version.version)


def run_of(store: Store, name: str, alias: str) -> tuple[str, Any] | None:
    """The number of the version with this alias, and the run that made it; None where either is not there."""
    if not store.client.search_registered_models(f"name = '{name}'"):
        return None
    number = _aliases(store, name).get(alias)
    if number is not None and (run_id := store.client.get_model_version(name, number).run_id):
        with unless_gone():
            return number, store.client.get_run(run_id)
    return None


def register(store: Store, run: Any, model: Model) -> str:
    """Make the model a version with the alias, doing only what is not done yet; return the version's number."""
    name = model.registered_model
    version = registered(store, name, model.sha256)
    if version is None:
        model_id = _logged(store, run, model)
        _link(store, run, model_id, model.step)
        if not store.client.search_registered_models(f"name = '{name}'"):
            store.client.create_registered_model(name)
        # With a database as its store, MLflow looks for models:/ where this variable says, not where the client does.
        with _environment(MLFLOW_TRACKING_URI=uri()):
            version = store.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=run.info.run_id,
                model_id=model_id,
                tags={MODEL_SHA256: model.sha256, **model.tags},
                description=model.description,
            )
        if version.status != "READY":
            raise Refusal(f"MLflow could not register {name}: version {version.version} is {version.status}")
    elif version.source.startswith("models:/"):
        _link(store, run, version.source.removeprefix("models:/"), model.step)
    if _aliases(store, name).get(ALIAS) != str(version.version):
        store.client.set_registered_model_alias(name, ALIAS, str(version.version))
    return str(version.version)


def _aliases(store: Store, name: str) -> dict[str, str]:
    return {alias: str(number) for alias, number in store.client.get_registered_model(name).aliases.items()}


def _link(store: Store, run: Any, model_id: str, step: int) -> None:
    """Show the logged model among the outputs of the run."""
    outputs = store.client.get_run(run.info.run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        store.client.log_outputs(run.info.run_id, [store.entities.LoggedModelOutput(model_id, step)])


def _logged(store: Store, run: Any, model: Model) -> str:
    """The id of the run's logged model with these bytes; one that a killed publication left unfinished is replaced."""
    of_run = f"source_run_id = '{run.info.run_id}'"
    for found in store.client.search_logged_models([store.experiment_id], of_run):
        if found.status == "READY" and found.tags.get(MODEL_SHA256) == model.sha256:
            return str(found.model_id)
        store.client.delete_logged_model(found.model_id)
    new = store.client.create_logged_model(
        store.experiment_id,
        name="model",
        source_run_id=run.info.run_id,
        tags={MODEL_SHA256: model.sha256, **model.tags},
    )
    _upload(store, model, run.info.run_id, new.model_id)
    store.client.finalize_logged_model(new.model_id, "READY")
    return str(new.model_id)


def _upload(store: Store, model: Model, run_id: str, model_id: str) -> None:
    """Write the model's files into the store, with a manifest of their SHA-256 whose own is a tag."""
    shutil.rmtree(BESIDE, ignore_errors=True)
    try:
        save(BESIDE, model, run_id, model_id)
        written = sorted(file for file in BESIDE.rglob("*") if file.is_file())
        manifest = {file.relative_to(BESIDE).as_posix(): files.sha256_of(file) for file in written}
        files.write_json(BESIDE / MANIFEST, manifest)
        digest = files.sha256_of(BESIDE / MANIFEST)
        # The server was just reachable; storing a large file takes it longer than an answer does.
        with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT="120"):
            store.client.log_model_artifacts(model_id, str(BESIDE))
    finally:
        for _ in range(2):  # where the disk fails at one file, the second try removes the rest
            shutil.rmtree(BESIDE, ignore_errors=True)
    store.client.set_logged_model_tags(model_id, {MANIFEST_SHA256: digest})


def upload_again(store: Store, model: Model) -> None:
    """Replace the files of the registered version with these bytes: its number and its aliases stay."""
    version = registered(store, model.registered_model, model.sha256)
    assert version is not None
    model_id = version.source.removeprefix("models:/")
    drop_half_copies(store.client.get_logged_model(model_id).artifact_location)
    _upload(store, model, version.run_id, model_id)


@contextmanager
def stored(name: str, sha256: str) -> Iterator[tuple[Path, str | None] | None]:
    """The folder with the files of the registered version with these bytes, and the SHA-256 of its manifest.

    None where there is no such version. Nothing is created. Call under `problems`; a server's files are fetched.
    """
    client = reader()
    if client is None or not client.search_registered_models(f"name = '{name}'"):
        yield None
        return
    found = _versions(client, name, sha256)
    if not found or not found[0].source.startswith("models:/"):
        yield None
        return
    logged = _readable(client, found[0].source.removeprefix("models:/"))
    if logged is None:
        yield None
        return
    digest = logged.tags.get(MANIFEST_SHA256)
    if (folder := local_folder(logged.artifact_location)) is not None:
        yield folder, digest
        return
    import mlflow.artifacts

    with tempfile.TemporaryDirectory() as beside:
        # Not always `beside` itself: of a server's files it is a folder in there.
        at = mlflow.artifacts.download_artifacts(logged.artifact_location, dst_path=beside, tracking_uri=uri())
        yield Path(at), digest


def _readable(client: Any, model_id: str) -> Any | None:
    """The logged model of this id, or None where somebody deleted it."""
    with unless_gone():
        return client.get_logged_model(model_id)
    return None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables of the environment for a while; MLflow reads its own at every call."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def weights_of(folder: Path) -> Path:
    """The Hugging Face folder in a model's files, where its description says that it is."""
    from mlflow.models import Model as Description

    return folder / str(Description.load(str(folder)).flavors["python_function"]["data"])


def save(folder: Path, model: Model, run_id: str, model_id: str) -> None:
    """Write the model as MLflow wants it."""
    import mlflow.pyfunc
    from mlflow.models import Model as Description
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {bool: "boolean", int: "long", float: "double"}
    options = [ParamSpec(name, kinds[type(value)], value) for name, value in serving.DEFAULTS.items()]
    description = Description(run_id=run_id, model_id=model_id, metadata={MODEL_SHA256: model.sha256, **model.tags})
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module="serving",
        data_path=str(model.folder),
        code_paths=[serving.__file__],
        mlflow_model=description,
        signature=ModelSignature(
            inputs=Schema([ColSpec("string")]), outputs=Schema([ColSpec("string")]), params=ParamSchema(options)
        ),
        input_example=([model.prompt], dict(serving.DEFAULTS)),
        pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
    )
    # The transformers flavour reads the same weights; of the tokenizer it wants a folder of its own.
    weights = Path(description.flavors["python_function"]["data"])
    shutil.copytree(
        model.folder,
        folder / "components" / "tokenizer",
        ignore=shutil.ignore_patterns("*.safetensors", "training.json"),
    )
    description.add_flavor(
        "transformers",
        transformers_version=_version("transformers"),
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type="AutoModelForCausalLM",
        source_model_name=model.registered_model,
        model_binary=weights.as_posix(),
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
        tokenizer_name=model.registered_model,
    )
    description.save(str(folder / "MLmodel"))


def _version(package: str) -> str:
    """The installed version, without a build's name: 2.13.0+cpu is on no registry."""
    return importlib.metadata.version(package).split("+")[0]
