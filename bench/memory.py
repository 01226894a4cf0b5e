"""Peak memory of training on this machine's CPU: predicted before it, and measured.

    python -m bench.memory                     # every shape, a few minutes each for the larger ones
    python -m bench.memory demo wide           # some of them

Each shape trains three steps in a process of its own, the way `train` does: losses before, two steps, losses, a
checkpoint and the best model written while the third step runs, losses again. Measured is the high-water mark of
resident memory that the kernel keeps (VmHWM, so Linux only); `ru_maxrss` would start at that of the parent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NUM_STEPS = 3
NUM_MEASURED = 5  # documents; each fills more than a window


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    num_layers: int
    num_heads: int
    embedding_size: int
    vocabulary_size: int
    max_length: int
    micro_batch_size: int
    precision: str
    dropout: float


SHAPES = {
    "demo": Shape(4, 4, 192, 3072, 128, 16, "bf16", 0.0),
    "demo-fp32": Shape(4, 4, 192, 3072, 128, 16, "none", 0.0),
    "wide": Shape(1, 2, 64, 50257, 512, 8, "none", 0.1),
    "long": Shape(2, 4, 64, 256, 1024, 8, "none", 0.1),
    "deep": Shape(24, 4, 256, 3072, 256, 8, "bf16", 0.0),
    "test-wide": Shape(1, 2, 32, 50257, 256, 4, "none", 0.1),
    "test-long": Shape(2, 8, 64, 256, 512, 8, "none", 0.1),
    **{
        f"gpt2-{size}-{precision}-{dropout:g}": Shape(12, 12, 768, 50257, 512, size, precision, dropout)
        for precision in ("bf16", "none")
        for size, dropout in ((1, 0.1), (2, 0.0), (4, 0.1), (4, 0.0))
    },
}


def measure(name: str) -> dict[str, int]:
    """Train in this process; bytes predicted and measured."""
    from pipeline import launcher

    launcher.settle()  # as a stage does
    import numpy as np

    from pipeline import device, files, fit, memory, model, runs, stage
    from pipeline.footprint import Rehearsal

    shape = SHAPES[name]
    params = stage.load_params()["train"]
    keys = ("num_layers", "num_heads", "embedding_size")
    params = params.model_copy(
        update={
            "scratch": params.scratch.model_copy(update={key: getattr(shape, key) for key in keys}),
            "max_length": shape.max_length,
            "dropout": shape.dropout,
            "batch_size": shape.micro_batch_size,
            "gradient_accumulation": 1,
            "micro_batch_size": "auto",
            "mixed_precision": shape.precision,
            "num_epochs": 1,
            "evaluation_interval_steps": NUM_STEPS - 1,
            "checkpoint_interval_steps": NUM_STEPS - 1,
            "evaluation_documents": NUM_MEASURED,
            "evaluation_batch_size": NUM_MEASURED,
            "device": "cpu",
        }
    )
    random = np.random.default_rng(0)
    windows = [shape.max_length - 1] * (NUM_STEPS * shape.micro_batch_size)
    lengths = windows + [shape.max_length] * NUM_MEASURED
    tokens = random.integers(0, shape.vocabulary_size - 1, sum(lengths)).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dvc.yaml", "params.yaml"):  # the thresholds of the verdicts in the log lines
            shutil.copy(name, folder)
        os.chdir(folder)
        Path("tokens/tokenizer").mkdir(parents=True)
        Path("split").mkdir()
        Path("tokens/tokens.bin").write_bytes(tokens.tobytes())
        np.save("tokens/offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        np.save("tokens/num_bytes.npy", np.asarray(lengths) * 4)
        np.save("tokens/hashes.npy", np.arange(len(lengths), dtype=np.uint64))
        end = shape.vocabulary_size - 1
        about = {"vocabulary_size": shape.vocabulary_size, "start_id": end, "end_id": end}
        files.write_json(Path("tokens/tokens.json"), about)
        files.write_json(Path("tokens/tokenizer/tokenizer_config.json"), {})
        np.save("split/train.npy", np.arange(len(windows)))
        np.save("split/validation.npy", np.arange(len(windows), len(lengths)))
        base = model.Params(base=model.SCRATCH, revision=None)
        with device.join_processes(params) as place:
            config = model.initial_config(base, params, **about)
            rehearsal = Rehearsal(config, params, device.DTYPES[place.precision], "cpu")
            footprint = rehearsal.footprint(memory.fitting(place, config, params), params.max_length)
            run = runs.Run("0" * 64)
            with run.opened(), contextlib.redirect_stdout(sys.stderr):
                paths = {"tokens": Path("tokens"), "split": Path("split")}
                fit.fit(run, place, paths, base, params, {})
    measured = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"predicted": footprint.peak("cpu")["host"], "measured": int(measured.split()[1]) * 1024} | vars(footprint)


def main() -> None:
    """Measure the shapes named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--here", action="store_true", help="in this process, a line of JSON each")
    arguments = parser.parse_args()
    if not arguments.here:
        print(f"{'shape':18}{'predicted':>10}{'measured':>10}   error    GB")
    for name in arguments.shapes or SHAPES:
        if arguments.here:
            print(json.dumps(measure(name)))
            continue
        command = [sys.executable, "-m", "bench.memory", "--here", name]
        result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{name} failed:\n{result.stderr[-2000:]}")
        found = json.loads(result.stdout.splitlines()[-1])
        predicted, measured = found.pop("predicted"), found.pop("measured")
        parts = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in found.items())
        error = f"{100 * (predicted / measured - 1):+.1f} %"
        print(f"{name:18}{predicted / 1e9:>10.2f}{measured / 1e9:>10.2f}{error:>9}    {parts}", flush=True)


if __name__ == "__main__":
    main()
