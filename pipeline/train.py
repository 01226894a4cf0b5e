"""train: the explicit loop, from the first step to the last, resumable at any of them.

In:  the tokens, the documents of each split, and the base model that params.yaml names.
Out: models/best (weights of the best validation loss) and models/last, both ordinary Hugging Face folders, and a row a
     step in train.jsonl. Losses are in nats per predicted token.

    python -m pipeline.train
    torchrun --nproc-per-node 2 -m pipeline.train

Interrupt it (Ctrl-C, SIGTERM) and run it again: it goes on where it was and ends with the same bytes. With another
parameter, other data or other code it starts clean; with PIPELINE_RESUME=1 it refuses instead and says what differs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import Field

from pipeline import files, stage
from pipeline import model as base

if TYPE_CHECKING:
    from pipeline.runs import Run


class Scratch(stage.Params):
    """The shape of a GPT-2 trained from scratch."""

    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    embedding_size: int = Field(ge=1)

    @pydantic.model_validator(mode="after")
    def _heads_share_embedding(self) -> Scratch:
        if self.embedding_size % self.num_heads:
            raise ValueError(f"embedding_size {self.embedding_size} is not divisible by num_heads {self.num_heads}")
        return self


class Params(stage.Params):
    """Section `train` of params.yaml; its comments there say what each means."""

    scratch: Scratch
    max_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    gradient_accumulation: int = Field(ge=1)
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)]
    num_epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0, le=1)
    schedule: Literal["linear", "cosine"]
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, lt=1)
    adam_beta1: float = Field(ge=0, lt=1)
    adam_beta2: float = Field(ge=0, lt=1)
    adam_epsilon: float = Field(gt=0, lt=1)
    max_grad_norm: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    non_finite: Literal["stop", "skip", "roll_back"]
    max_non_finite: int = Field(ge=1)
    roll_back_factor: float = Field(gt=0, lt=1)
    mixed_precision: Literal["auto", "bf16", "fp16", "none"]
    isolate_documents: bool
    evaluation_interval_steps: int = Field(ge=0)
    evaluation_documents: int = Field(ge=1)
    evaluation_batch_size: int = Field(ge=1)
    evaluation_bootstrap_samples: int = Field(ge=100)
    early_stopping_patience: int = Field(ge=0)
    checkpoint_interval_steps: int = Field(ge=1)
    device: str = Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    num_workers: int = Field(ge=0)
    seed: int = Field(ge=0, lt=2**32)

    def windows_at_once(self, num_processes: int) -> int:
        """Windows a forward pass of each process, where memory suffices."""
        share = -(-self.batch_size * self.gradient_accumulation // num_processes)
        return min(share, self.batch_size if self.micro_batch_size == "auto" else self.micro_batch_size)

    @pydantic.model_validator(mode="after")
    def _fp16_needs_a_gpu(self) -> Params:
        if self.mixed_precision == "fp16" and self.device in ("cpu", "mps"):
            raise ValueError(f"mixed_precision fp16 needs a GPU, but device is {self.device}; use bf16 or none")
        return self


def main(paths: stage.Paths, model: base.Params, train: Params) -> None:
    """Train, or go on training, or only copy out what is trained already."""
    from pipeline import device, fit, resume, runs

    with device.join_processes(train) as place:
        numbers = device.numeric_class(place.device, place.precision, place.world_size)
        made_of = {
            "data and code": {str(path): files.sha256_of(path) for path in stage.dependencies_of("train")},
            "params": {"model": model.model_dump(), "train": train.model_dump()},
            "numeric class": numbers,
        }
        identity = runs.fingerprint(made_of)
        run = runs.Run(identity)
        about = {"fingerprint": identity, "numeric_class": numbers}
        if place.is_first:
            resume.check(run, made_of)
        with run.opened() if place.is_first else contextlib.nullcontext():
            if place.is_first:
                resume.remember(run, made_of)
                follow(run.folder)
            if not device.any_process(place.is_first and run.finished):
                fit.fit(run, place, paths, model, train, about)
            if place.is_first:
                copy_out(run, paths)
                print(f"train: {paths['best']} and {paths['last']} are written")


def copy_out(run: Run, paths: stage.Paths) -> None:
    """Copy a finished run to where DVC expects it; the run's own copy stays until another run has finished."""
    for name, trained in (("best", run.best), ("last", run.last)):
        with files.whole_folder(paths[name]) as folder:
            files.copy_folder(trained, folder)
    with files.whole_file(paths["train.jsonl"]) as rows:
        shutil.copyfile(run.rows_file, rows)
    run.clean_up()


def follow(folder: Path) -> None:
    """Start the process that shows this run's rows while they grow. Training neither waits for it nor needs it."""
    with (folder / "follow.log").open("wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.follow", str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


if __name__ == "__main__":
    stage.run("train", main)
