"""Does `make verify` find every flipped bit? Flips them one at a time, and counts false alarms of runs without any.

    python -m bench.bit_flips --flips 10000 --clean 1000

Runs the whole pipeline once, small, in a folder of its own, interrupts a training to have a checkpoint, and then, for
each flip: picks a file (half of the time every file is as likely as the other, half of the time every byte), flips one
bit in place with mode and time kept, runs all of verify, demands that it names this file and no other, and flips it
back. The files are found by walking the folders, not by asking verify: outputs and inputs of all stages, DVC's cache,
checkpoints with their manifests, the model in MLflow's store. What runs each time is `verify.check`, whole; only the
two questions that it asks `dvc` (where is the cache, what is ignored) are answered once: a flip changes no answer.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pipeline import files, recorded, stage, verify
from pipeline.recorded import Difference

SMALL = {
    "ingest": {"demo_documents": 1200},
    "train": {"scratch": {"num_layers": 1, "num_heads": 2, "embedding_size": 16}},
}


def prepare(folder: Path) -> None:
    """The pipeline's result in this folder, with a checkpoint of another training, which was interrupted."""
    from tests.test_end_to_end import Clone

    clone = Clone(folder)
    clone.change(SMALL)
    clone.repro()
    rate = {"learning_rate": 1e-4, "num_epochs": 1000, "checkpoint_interval_steps": 10}
    params = (folder / "params.yaml").read_bytes()
    clone.change({"train": rate})
    command = [sys.executable, "-m", "pipeline.train"]
    with subprocess.Popen(command, cwd=folder, env=clone.environment, stdout=subprocess.DEVNULL) as trainer:
        while len(list(folder.glob(".runs/*/checkpoint-*/manifest.json"))) < 2 and trainer.poll() is None:
            time.sleep(0.1)
        trainer.terminate()
    (folder / "params.yaml").write_bytes(params)


def kinds_of_files() -> dict[Path, str]:
    """Every file that verify has to watch, with its kind."""
    found: dict[Path, str] = {}
    for definition in stage.read_stages().values():
        for kind in ("outs", "metrics", "plots", "deps"):
            for entry in definition.get(kind, []):
                path = Path(entry if isinstance(entry, str) else next(iter(entry)))
                inner = recorded.not_ignored(recorded.files_under(path)) if path.is_dir() else {path}
                for file in inner:
                    found.setdefault(file, "input or code" if kind == "deps" else "output")
    for pattern, kind in (
        (".dvc/cache/files/**/*", "object of DVC's cache"),
        (".runs/*/checkpoint-*/*", "checkpoint"),
        ("mlartifacts/models/**/*", "model in MLflow"),
    ):
        found |= {path: kind for path in Path().glob(pattern) if path.is_file()}
    # What a stage reads from another one is an output.
    outputs = {path for path, kind in found.items() if kind == "output"}
    return {path: "output" if path in outputs else kind for path, kind in found.items()}


def flip(path: Path, position: int, bit: int) -> None:
    """Flip a bit in place, mode and time kept: nothing but the bytes tells."""
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def is_named(path: Path, differences: list[Difference]) -> bool:
    """Whether this file is named and no other; of a checkpoint's manifest, the files that it tells of."""
    named = {difference.record.path for difference in differences}
    if path.name == files.MANIFEST and recorded.RUNS in path.parents:
        return bool(named) and {file.parent for file in named} == {path.parent}
    return named == {path}


def main() -> None:
    """Read the command line, prepare, flip, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--clean", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "clone"
        prepare(folder)
        os.chdir(folder)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        cache, kinds = recorded.cache_folder(), kinds_of_files()
        sizes = {path: path.stat().st_size for path in sorted(kinds) if path.stat().st_size}
        first = verify.check(cache)
        print(f"{len(sizes)} files, {sum(sizes.values()):,} bytes; verify reads {first.num_bytes:,} bytes", flush=True)
        chance = random.Random(options.seed)
        began_s = time.monotonic()
        alarms = sum(bool(verify.check(cache).differences) for _ in range(options.clean))
        clean_s = time.monotonic() - began_s
        found: Counter[str] = Counter()
        tried: Counter[str] = Counter()
        began_s = time.monotonic()
        for number in range(options.flips):
            (path,) = chance.choices(list(sizes), weights=list(sizes.values()) if number % 2 else None)
            position, bit = chance.randrange(sizes[path]), chance.randrange(8)
            flip(path, position, bit)
            differences = verify.check(cache).differences
            flip(path, position, bit)
            tried[kinds[path]] += 1
            if is_named(path, differences):
                found[kinds[path]] += 1
            else:
                print(f"MISSED {path} byte {position} bit {bit}: {[str(one) for one in differences]}", flush=True)
        flips_s = time.monotonic() - began_s
        for kind in sorted(tried):
            print(f"{kind:24} {found[kind]:6} of {tried[kind]:6} flips found and named")
        print(f"{'all':24} {found.total():6} of {tried.total():6} flips found and named, {flips_s:.0f} s")
        print(f"{'false alarms':24} {alarms:6} of {options.clean:6} runs without a flip, {clean_s:.0f} s")
        os.chdir("/")
    sys.exit(0 if found == tried and not alarms else 1)


if __name__ == "__main__":
    main()
