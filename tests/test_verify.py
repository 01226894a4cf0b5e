"""Every damaged byte is found and named, nothing else is, and repairing touches only what the pipeline wrote."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import files, inputs, recorded, registry, stage, verify
from tests import result
from tests.tiny import ROOT

DVC_YAML = """
stages:
  make:
    cmd: python make.py
    deps: [make.py, shared.txt, source]
    outs: [out/tree, out/one.txt]
  use:
    cmd: python -c "from pathlib import Path; Path('out/two.txt').write_bytes(Path('out/one.txt').read_bytes() * 2)"
    deps: [out/one.txt, out/tree, shared.txt]
    metrics: [{out/two.txt: {cache: false}}]
  publish:
    cmd: "true"
    outs: [publication.json]
"""
MAKE = """
from pathlib import Path
Path("out/tree/inner").mkdir(parents=True)
Path("out/one.txt").write_text("one" * 1000)
Path("out/tree/a.bin").write_bytes(bytes(range(256)) * 10)
Path("out/tree/inner/\N{LATIN SMALL LETTER U WITH DIAERESIS}.txt").write_text("two")
"""
TREE = ["out/tree/a.bin", "out/tree/inner/ü.txt"]


def dvc(*arguments):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", *arguments]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PATH": path})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small repository, made by DVC, with a checkpoint of an unfinished run."""
    folder = tmp_path_factory.mktemp("made")
    files.write_text(folder / "make.py", MAKE)
    files.write_text(folder / "shared.txt", "")
    files.write_text(folder / "source/mine.txt", "mine")
    files.write_text(folder / "source/README.md", "not data")
    files.write_text(folder / ".dvcignore", "source/README.md\n")
    files.write_text(folder / "dvc.yaml", DVC_YAML)
    checkpoint = folder / ".runs/0123/checkpoint-00000100"
    files.write_text(checkpoint.parent / "train.jsonl", '{"step": 1}\n{"step": 2}\n')
    files.write_text(checkpoint.parent / "best-00000050/weights", "w")
    rows = {"num_bytes": 12, "sha256": hashlib.sha256(b'{"step": 1}\n').hexdigest()}
    best = {"step": 50, "sha256": files.sha256_of(checkpoint.parent / "best-00000050")}
    files.write_json(checkpoint / "state.json", {"rows": rows, "best": best})
    files.write_json(checkpoint / "manifest.json", {"state.json": files.sha256_of(checkpoint / "state.json")})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dvc("init", "--quiet", "--no-scm")
        dvc("config", "core.analytics", "false")
        dvc("repro", "use")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here", symlinks=True))
    monkeypatch.setattr(recorded, "dvc", ask_dvc_once)
    return Path(".dvc/cache")


ANSWERS: dict = {}
REAL_DVC = recorded.dvc


def ask_dvc_once(*arguments, text="", codes=(0,)):
    """The same answer to the same question: half a second each."""
    key = (arguments, text)
    if key not in ANSWERS:
        ANSWERS[key] = REAL_DVC(*arguments, text=text, codes=codes)
    return ANSWERS[key]


def flip(path, bit=3):
    """Flip a bit in place, keeping mode and time: DVC notices nothing."""
    path = Path(path)
    content, before = bytearray(path.read_bytes()), path.stat()
    content[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def found(cache):
    return sorted(str(difference) for difference in verify.check(cache).differences)


def copy_of(path):
    return recorded.object_path(Path(".dvc/cache"), inputs.digest_of(Path(path), "md5"))


def folder_object():
    (at,) = Path(".dvc/cache").glob("files/md5/*/*.dir")
    return at


def main(*arguments):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "pipeline.verify", *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
    )  # fmt: skip


# --- what is found -------------------------------------------------------------------------------------------------


def test_nothing_differs_in_what_dvc_left(here):
    tally = verify.check(here)
    assert tally.differences == []
    # make.py, __init__.py; one, two, tree (2); copies of one and tree and its list; state.json
    assert tally.num_files == 2 + 4 + 4 + 1
    assert tally.num_bytes > 2 * (3000 + 2560) + 6000


@pytest.mark.parametrize("path", ["out/one.txt", "out/two.txt", *TREE])
def test_a_changed_output_is_named_with_its_stage(here, path):
    flip(path)
    assert found(here) == [f"{path}: {'use' if 'two' in path else 'make'}: changed"]
    Path(path).unlink()
    assert found(here) == [f"{path}: {'use' if 'two' in path else 'make'}: missing"]


@pytest.mark.parametrize("path", ["out/one.txt", *TREE])
def test_a_changed_object_of_the_cache_that_is_still_read_only_is_named(here, path):
    at = copy_of(path)
    assert at.stat().st_mode & 0o777 == 0o444
    flip(at)
    assert found(here) == [f"{at}: make, copy of {path}: changed"]
    at.unlink()
    assert found(here) == [f"{at}: make, copy of {path}: missing"]


def test_a_changed_list_of_a_folder_is_named_and_hides_nothing(here):
    flip(folder_object())
    assert found(here) == [f"{folder_object()}: make, copy of out/tree: changed"]
    flip(copy_of(TREE[1]))
    assert len(found(here)) == 2
    flip(TREE[0])  # now neither side tells what the folder held
    assert f"out/tree: make: changed; which of its files cannot be told without {folder_object()}" in found(here)


def test_what_is_yours_is_named_as_yours(here):
    flip("make.py")
    flip("source/mine.txt")
    Path("source/README.md").write_text("DVC ignores it, so do we")
    assert found(here) == ["make.py: make: changed (yours)", "source: make: changed (yours)"]
    Path("shared.txt").write_text("1")
    assert "shared.txt: make, use: changed (yours)" in found(here)


def test_a_file_that_no_stage_wrote_in_an_output_folder_is_named_as_yours(here):
    Path("out/tree/notes.txt").write_text("mine")
    assert found(here) == ["out/tree/notes.txt: make: is no output; move it away (yours)"]


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_changed_checkpoint_is_named(here, name):
    path = Path(".runs/0123/checkpoint-00000100") / name
    flip(path, 8 * 1 + 2)
    assert len(found(here)) == 1 and f"{path.parent}/" in found(here)[0] and "checkpoint: changed" in found(here)[0]
    path.unlink()
    assert found(here) == [f"{path}: checkpoint: missing"]


def test_names_in_a_manifest_that_are_not_those_of_its_files_are_a_fault_of_the_manifest(here):
    path = Path(".runs/0123/checkpoint-00000100/manifest.json")
    for name in ("../../../make.py", "/etc/hostname", "", "state.js/n", "stade.json"):
        files.write_json(path, {name: "0" * 64})
        assert found(here) == [f"{path}: checkpoint: changed"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2].rstrip("\n") + "\n  - [",
        lambda text: text.replace("md5: ", "md5: x", 1),
        lambda text: text.replace("stages:", "stoges:"),
        lambda text: text.replace("path: out/one.txt", "path: ../out/one.txt"),
        lambda text: "",
        lambda text: "stages: 3",
        lambda text: text + "\0",
    ],
)
def test_a_damaged_lock_is_one_sentence(here, damage):
    lock = Path("dvc.lock")
    lock.write_text(damage(lock.read_text()))
    with pytest.raises(stage.Refusal, match=r"dvc\.lock is damaged \(.+\); restore it with `git checkout dvc\.lock`"):
        verify.check(here)
    lock.unlink()
    with pytest.raises(stage.Refusal, match=r"no dvc\.lock yet"):
        verify.check(here)


def test_a_lock_that_holds_two_states_is_said_to(here):
    lock = Path("dvc.lock")
    digest = inputs.digest_of(Path("out/one.txt"), "md5")
    make, _, use = lock.read_text().partition("  use:")
    lock.write_text(make + "  use:" + use.replace(digest, "f" * 32))
    assert found(here) == [
        "dvc.lock: use: was made from another state of out/one.txt than make left; run `dvc repro`",
    ]
    lock.write_text(make + "  use:" + use.replace(inputs.digest_of(Path("shared.txt"), "md5"), "f" * 32))
    assert found(here) == ["dvc.lock: use: was made from another state of shared.txt than make; run `dvc repro`"]
    lock.write_text((make + "  use:" + use).replace("path: out/two.txt", "path: out/tvo.txt"))
    assert found(here) == ["dvc.lock: use: names out/tvo.txt, which dvc.yaml does not; run `dvc repro`"]


# --- what is repaired ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["out/one.txt", *TREE])
@pytest.mark.parametrize("side", ["output", "object"])
@pytest.mark.parametrize("damage", [flip, os.unlink])
def test_one_good_side_restores_the_other(here, path, side, damage):
    at = Path(path) if side == "output" else copy_of(path)
    mode = at.stat().st_mode
    damage(at)
    assert verify.repair(verify.check(here).differences) == []
    assert found(here) == []
    assert at.stat().st_mode == mode


def test_the_list_of_a_folder_is_restored_from_the_folder(here):
    before = folder_object().read_bytes()
    flip(folder_object())
    assert verify.repair(verify.check(here).differences) == []
    assert folder_object().read_bytes() == before


@pytest.mark.parametrize("damaged", ["checkpoint-00000100/state.json", "train.jsonl", "best-00000050/weights"])
def test_a_checkpoint_that_is_damaged_or_names_what_is_gets_deleted_and_nothing_else(here, damaged):
    run = Path(".runs/0123")
    flip(run / damaged)
    (line,) = found(here)
    assert line.startswith(f"{run}/checkpoint-00000100/state.json: checkpoint: ")
    assert damaged.startswith("checkpoint") or damaged.split("/")[0] in line
    assert verify.repair(verify.check(here).differences) == []
    assert {path.name for path in run.iterdir()} == {"train.jsonl", "best-00000050"}
    assert found(here) == []


def test_rows_after_a_checkpoint_are_nobody_s_yet(here):
    with Path(".runs/0123/train.jsonl").open("a") as rows:
        rows.write("half a ro")
    assert found(here) == []


def test_damaged_evidence_of_a_step_is_deleted_and_the_checkpoints_stay(here):
    evidence = Path(".runs/0123/non_finite-00000103")
    files.write_text(evidence / "step.json", "{}")
    files.write_json(evidence / "manifest.json", {"step.json": files.sha256_of(evidence / "step.json")})
    flip(evidence / "step.json")
    assert verify.repair(verify.check(here).differences) == []
    assert not evidence.exists() and Path(".runs/0123/checkpoint-00000100").exists()


def test_a_run_with_another_damaged_part_is_deleted_as_a_whole(here):
    best = Path(".runs/4567/best")
    files.write_text(best / "weights", "w")
    files.write_json(best / "manifest.json", {"weights": files.sha256_of(best / "weights")})
    assert found(here) == []
    flip(best / "weights")
    assert verify.repair(verify.check(here).differences) == []
    assert [run.name for run in Path(".runs").iterdir()] == ["0123"]


def test_what_is_yours_is_left_alone_and_what_would_need_it_is_not_made_from_it(here):
    flip(copy_of("out/one.txt"))
    flip("out/one.txt")
    flip("make.py")
    Path("out/tree/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert verify.repair(verify.check(here).differences) == []
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("link", ["copy", "symlink"])
def test_what_is_damaged_on_both_sides_is_made_again(here, link):
    dvc("config", "cache.type", link)
    dvc("checkout", "--relink", "--force", "make")
    lock = Path("dvc.lock").read_text()
    clean = main()
    assert (clean.returncode, clean.stderr) == (0, "")
    assert clean.stdout.startswith("verify: 11 files, ") and clean.stdout.endswith(" bytes, all as recorded\n")
    at = copy_of("out/tree/a.bin")
    flip(at)
    if link == "copy":
        flip("out/tree/a.bin")
    flip("out/two.txt")  # DVC keeps no copy of it
    seen = main()
    assert seen.returncode == 1 and "--repair` restores" in seen.stderr
    assert sorted(seen.stdout.splitlines()) == sorted(
        [
            f"{at}: make, copy of out/tree/a.bin: changed",
            "out/tree/a.bin: make: changed",
            "out/two.txt: use: changed",
        ]
    )
    done = main("--repair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'make'" in done.stdout and done.stdout.endswith("all as recorded\n")
    assert Path("dvc.lock").read_text() == lock
    assert Path("source/mine.txt").read_text() == "mine"


# --- the published model -------------------------------------------------------------------------------------------


@pytest.fixture
def published(repository):
    result.publish_here()
    report = result.paths()["publication.json"]

    def differences():
        tally = verify.Tally()
        verify._check_published(report, tally)
        return tally.differences

    assert differences() == []
    return differences


def artifacts():
    (folder,) = Path("mlartifacts/models").glob("*/artifacts")
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_every_file_of_the_published_model_is_compared_and_restored_under_its_version(published):
    assert len(artifacts()) >= 12
    for file in artifacts():
        flip(file)
        (difference,) = published()
        assert str(difference) == f"{file}: publish: changed"
        flip(file)
    assert published() == []
    flip(artifacts()[3])
    artifacts()[-1].unlink()
    assert len(published()) == 2
    verify._publish_again(published())
    assert published() == []
    from pipeline import tracking

    name = json.loads(result.paths()["publication.json"].read_text())["registered_model"]
    with tracking.problems():
        client = tracking.load_mlflow().MlflowClient(tracking.uri(), tracking.uri())
        assert [version.version for version in client.search_model_versions(f"name='{name}'")] == [1]

    Path("mlflow.db").unlink()
    (difference,) = published()
    assert "in MLflow: publish: missing" in str(difference)
    assert not Path("mlflow.db").exists(), "asking creates nothing"


def test_a_model_without_recorded_hashes_gets_them(published, monkeypatch):
    monkeypatch.setattr(registry, "MANIFEST_SHA256", "pipeline.another_tag")
    (difference,) = published()
    assert "has no recorded hashes" in str(difference)
    verify._publish_again([difference])
    assert published() == []


def test_a_store_out_of_reach_is_said_to_be(published, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (difference,) = published()
    assert "in MLflow: publish: cannot be read: the MLflow store at http://127.0.0.1:9 cannot be used" in str(
        difference
    )
    verify._publish_again([difference])
