"""verify: read again every byte that this checkout has recorded, and say what differs.

Compared are the outputs and inputs of every stage with dvc.lock, DVC's copies of the outputs with their names, every
checkpoint with its manifest, and the model in MLflow with the manifest that was published with it. Hashes come from
bytes: neither DVC's database of known files nor a file's mode or time counts (to DVC, a damaged object of its cache
that is still read-only is sound).

    python -m pipeline.verify
    python -m pipeline.verify --repair

Prints one line a difference: file, stage, what. Exit codes: 0 all is as recorded, 1 something differs. `--repair`
restores what the pipeline wrote: an output from DVC's copy or the copy from the output, and where both are damaged, by
running the stage again. A damaged checkpoint is deleted, for training falls back to the one before. The model in MLflow
is written again under its version. What is yours, text and code, is never touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import files, inputs, owner, publication, publish, recorded, stage
from pipeline.recorded import Difference, Record


@dataclass
class Tally:
    """What was read, and what differs."""

    differences: list[Difference] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0

    def compare(self, record: Record) -> bool:
        """Hash a file; whether it is as recorded."""
        algorithm = "sha256" if record.kind in ("checkpoint", "published") else "md5"
        self.num_files += 1
        try:
            self.num_bytes += record.path.stat().st_size
            if inputs.digest_of(record.path, algorithm) == record.digest.removesuffix(".dir"):
                return True
            what = "changed"
        except FileNotFoundError:
            what = "missing"
        except OSError as problem:
            what = f"cannot be read ({problem.strerror})"
        self.differences.append(Difference(record, what))
        return False


def check(cache: Path) -> Tally:
    """Compare everything.

    Args:
        cache: the folder of DVC's cache.

    Raises:
        Refusal: dvc.lock is missing or damaged.
    """
    inventory = recorded.inventory(cache)
    tally = Tally(list(inventory.differences))
    sound = {record.path for record in inventory.records.values() if tally.compare(record)}
    report = stage.paths_of(inventory.definitions["publish"])["publication.json"]
    if report in sound:
        _check_published(report, tally)
    return tally


def _check_published(report: Path, tally: Tally) -> None:
    """Compare the model in MLflow that the report of publishing names."""
    result = files.read_json(report)
    check_model(result["registered_model"], result["model_sha256"], tally)


def check_model(name: str, sha256: str, tally: Tally) -> None:
    """Compare the files of the registered version with these bytes, and what they hash to."""
    from pipeline import registry, tracking

    model = Path(f"{name!r} in MLflow")

    def differs(what: str) -> None:
        tally.differences.append(Difference(Record(model, "publish", "published", ""), what))

    try:
        with tracking.problems(), registry.stored(name, sha256) as stored:
            if stored is None:
                return differs("missing")
            folder, digest = recorded.from_here(stored[0]), stored[1]
            if digest is None:
                return differs("has no recorded hashes; it was published before there were any")
            compare_published(folder, digest, sha256, tally)
    except stage.Refusal as problem:
        differs(f"cannot be read: {problem}")


def compare_published(folder: Path, digest: str, sha256: str, tally: Tally) -> None:
    """Compare a model as MLflow holds it with the manifest that was published with it, and with its tags.

    Args:
        digest: SHA-256 of the manifest.
        sha256: of the model, as `publication.model_sha256` makes it.
    """
    if not tally.compare(Record(folder / files.MANIFEST, "publish", "published", digest)):
        return
    manifest = files.read_json(folder / files.MANIFEST)
    paths = {recorded.inside(folder, file): digest for file, digest in manifest.items()}
    models = [path.parent for path in paths if path.name == "training.json"]  # which every model of ours has
    whole = all([tally.compare(Record(path, "publish", "published", paths[path])) for path in paths])
    if whole and [publication.model_sha256(path) for path in models] != [sha256]:
        record = Record(folder, "publish", "published", "")
        tally.differences.append(Difference(record, "holds another model than its tags say"))


def repair(differences: Sequence[Difference]) -> list[str]:
    """Copy back what has a good twin, remove what has none; return the stages that have to run for it.

    A stage whose inputs of yours have changed is not run: it would make something else.
    """
    damaged = {difference.record.path: difference.record for difference in differences}
    changed = {name for r in damaged.values() if r.kind == "yours" for name in r.stage.split(", ")}
    again = set()
    for path, record in damaged.items():
        if record.kind == "checkpoint":
            # Training goes back to the checkpoint before, and does without the evidence of a step that was not finite.
            # Without another part of its folder, a run has to begin anew.
            alone = path.parent.name.startswith(("checkpoint-", "non_finite-"))
            shutil.rmtree(path.parent if alone else recorded.run_of(path), ignore_errors=True)
        elif record.kind in ("output", "object"):
            if record.twin and record.twin.is_file() and record.twin not in damaged:
                _put(path, record.twin.read_bytes(), record)
            elif record.digest.endswith(".dir") and record.twin and recorded.is_whole(record.twin, record.digest):
                _put(path, recorded.listing_text(record.twin), record)
            elif record.stage not in changed:
                again.add(record.stage)
                _remove(path)
        elif record.kind == "stale" and record.stage not in changed:
            again.add(record.stage)
    return [name for name in stage.read_stages() if name in again]


def _put(path: Path, content: bytes, record: Record) -> None:
    """Write a file whole; never into what is there, which may be a link to the other side."""
    with files.whole_file(path) as beside:
        beside.write_bytes(content)
        if record.kind == "object":
            beside.chmod(0o444)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run_again(name: str) -> None:
    """Let DVC run one stage, with this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", name]
    if subprocess.run(command, env={**os.environ, "PATH": path}, check=False).returncode:
        raise stage.Refusal(f"stage {name} could not run again; see above")


def _publish_again(differences: Sequence[Difference]) -> None:
    whats = {difference.what for difference in differences if difference.record.kind == "published"}
    if any(what.startswith("cannot be read:") for what in whats):
        return  # MLflow is out of reach
    if whats:
        publish.upload_again()


def main() -> None:
    """Read the command line; check, and repair if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repair", action="store_true", help="restore what the pipeline wrote")
    repairs = parser.parse_args().repair
    with stage.refusals("verify"):
        cache = recorded.cache_folder()
        with owner.alone("verify"):
            tally = _shown(check(cache))
            again = repair(tally.differences) if repairs else []
        if repairs and tally.differences:
            for name in again:
                _run_again(name)
            _publish_again(tally.differences)
            print("verify: repaired what could be; once more:", flush=True)
            with owner.alone("verify"):
                tally = _shown(check(cache))
        if tally.differences:
            fix = "" if repairs else "; `python -m pipeline.verify --repair` restores what the pipeline wrote"
            raise stage.Refusal(f"{len(tally.differences)} differences in {tally.num_files:,} files{fix}")
        print(f"verify: {tally.num_files:,} files, {tally.num_bytes:,} bytes, all as recorded")


def _shown(tally: Tally) -> Tally:
    for difference in tally.differences:
        print(difference, flush=True)
    return tally


if __name__ == "__main__":
    main()
