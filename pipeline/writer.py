"""What training leaves on disk and on the screen: rows, lines, checkpoints, model folders. Only one process has it."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline import files, model, non_finite, stage
from pipeline.checkpoints import Background, Checkpoint, Checkpoints, whole_folder
from pipeline.loop import NonFinite, Step
from pipeline.progress import Progress
from pipeline.runs import Run
from pipeline.stage import Refusal
from pipeline.train import Params
from pipeline.trainer import Trainer, capture

if TYPE_CHECKING:
    from pipeline.fit import Standing


class Writer:
    """Writes for one run.

    Args:
        tokens_folder: where the tokenizer lies, which belongs into every model folder.
        about: goes into the training.json of every model folder.
    """

    def __init__(
        self, run: Run, checkpoints: Checkpoints, tokens_folder: Path, params: Params, about: dict[str, Any]
    ) -> None:
        self.run, self.checkpoints, self.tokens_folder = run, checkpoints, tokens_folder
        self.params, self.about = params, about
        self.background = Background()
        self.copies: dict[str, Tensor] = {}  # of the state, for the background
        # Looked up by name and no dependency: it decides what a line says, never what a file holds.
        self.judgement = stage.load_params()["evaluate"]
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_problem: object) -> None:
        self.background.close()  # nothing is written any more once another process may
        self._open.close()

    def start(self, trainer: Trainer, checkpoint: Checkpoint | None) -> None:
        """Refuse what cannot end well, cut the rows to the checkpoint, say what is about to happen."""
        self.trainer = trainer
        batches, first = trainer.batches, checkpoint.step if checkpoint else 0
        for partial in self.run.folder.glob(".*.partial"):  # of a process that was killed
            files.remove(partial)
        check_disk(trainer.num_parameters, self.run.folder)
        if checkpoint:
            self.run.start_rows(checkpoint.state["rows"]["num_bytes"], checkpoint.rows_sha256)
        else:
            self.run.start_rows()
        self.best: dict[str, Any] = checkpoint.state["best"] if checkpoint else {"step": 0, "sha256": None}
        self.progress = Progress(self.run.folder, first, trainer.num_steps, batches.num_tokens_before(first))
        self._open.callback(self.progress.close)
        if checkpoint:
            self.say(f"going on after step {first} of {trainer.num_steps} ({self.run.folder})")
        self.watch = self.judgement.watch(self.run.rows_file)
        dtype = str(trainer.model.dtype).removeprefix("torch.")
        self.say(
            f"{trainer.num_parameters:,} parameters on {trainer.device} ({dtype}), "
            f"{batches.tokens_per_epoch:,} tokens an epoch, {trainer.num_steps} steps of "
            f"{batches.windows_per_step} x {batches.max_length} tokens"
        )

    def say(self, line: str) -> None:
        """Print a line of this stage."""
        self.progress.say(f"train: {line}")

    def add_first_row(self, row: dict[str, Any]) -> None:
        """The row of step 0: losses before training."""
        self.run.add_row(row)
        self.say(f"before training: validation loss {row['validation_loss']:.4f}")

    def add_row(self, step: Step, row: dict[str, Any], standing: Standing, is_best: bool) -> None:
        """A step's row; after an evaluation also a line, and where memory was short."""
        self.run.add_row(row)
        self.progress.advance(step)
        if "micro_batch_size" in row:
            self.say(f"step {step.step}: memory is short, from here on {step.micro_batch_size} windows a forward pass")
        if "validation_loss" in row:
            mark = "* new best" if is_best else f"best {standing.best_validation_loss:.4f} at step {standing.best_step}"
            low, high = row["validation_loss_ci95"]
            facts, verdicts = self.watch.look()
            trend = (
                f"slope {facts.validation_slope:+.3g}  gradient {facts.recent_grad_norm:.3g}  "
                f"{facts.learning_rate_phase}  "
                if facts
                else ""
            )
            self.say(
                f"epoch {row['epoch']:.4g}/{self.params.num_epochs}  step {step.step}  "
                f"train {row['train_eval_loss']:.4f}  "
                f"validation {row['validation_loss']:.4f} ({low:.2f} to {high:.2f})  "
                f"gap {row['validation_loss'] - row['train_eval_loss']:+.4f}  "
                f"{trend}{mark}  {', '.join(verdicts)}".rstrip()
            )

    def save(
        self, row: dict[str, Any], standing: Standing, best: bool, checkpoint: bool, pending: Step | None = None
    ) -> None:
        """Copy the state as it is, and write it while training goes on: the best model, a checkpoint, or both.

        Args:
            pending: the step of this state, where it was not measured to its end and has no row yet.
        """
        self.background.wait()  # memory for one copy, not for more
        tensors, state = capture(self.trainer, self.copies)
        rows = self.run.rows_so_far()

        def write() -> None:
            if best:
                path = self.checkpoints.best(row["step"])
                self.write_model(path, tensors, row)
                self.best = {"step": row["step"], "sha256": files.sha256_of(path)}
            if checkpoint:
                whole = {"trainer": state, "standing": asdict(standing), "rows": rows, "best": self.best,
                         "pending": asdict(pending) if pending else None}  # fmt: skip
                self.checkpoints.write(Checkpoint(row["step"], tensors, whole))

        standing = replace(standing)
        self.background.start(write)

    def finish(self, row: dict[str, Any], stopped: str) -> None:
        """Write best/ and last/ and mark the run as finished."""
        self.background.wait()
        self._open.close()
        if stopped == "early_stopping":
            print(f"train: stopped early, {self.params.early_stopping_patience} evaluations without a new best")
        self.write_model(self.run.last, capture(self.trainer, self.copies)[0], row | {"stopped": stopped})
        with whole_folder(self.run.best) as beside:
            files.copy_folder(self.checkpoints.best(self.best["step"]), beside)
            self._refuse_other(files.sha256_of(beside), self.best["sha256"])
        self._refuse_other(files.sha256_of(self.run.rows_file), self.run.rows_so_far()["sha256"])
        self.run.finish()

    def _refuse_other(self, found: str, written: str) -> None:
        """What has changed since it was written is no result."""
        if found != written:
            raise Refusal(
                f"a file in {self.run.folder} has changed since it was written; the same command goes back to the last "
                "checkpoint before that"
            )

    def write_model(self, folder: Path, tensors: dict[str, Tensor], row: dict[str, Any]) -> None:
        """An ordinary model folder: weights in float32, configuration, tokenizer, and how they came about."""
        trained = self.trainer.model
        with whole_folder(folder) as beside:
            weights = self.trainer.masters.state_dict(trained, tensors)
            trained.save_pretrained(beside, state_dict=weights, max_shard_size="1TB")
            files.copy_folder(self.tokens_folder / "tokenizer", beside)
            change_json(beside / "config.json", dtype="float32")  # of the weights there, not of the model in training
            change_json(beside / "tokenizer_config.json", model_max_length=model.num_positions(trained.config))
            keys = ("num_tokens", "step", "validation_loss", "stopped")
            about: dict[str, Any] = {key: row[key] for key in keys if key in row}
            about |= {"num_parameters": self.trainer.num_parameters, "num_steps": self.trainer.num_steps}
            files.write_json(beside / "training.json", self.about | about)

    def keep_evidence(self, problem: NonFinite) -> str:
        """What is needed to look into a step that was not finite; returns a sentence on where it is."""
        self.background.wait()
        folder = non_finite.keep(self.run.folder, self.trainer, problem, self.tokens_folder)
        return f"\nWhat that step saw is in {folder}; `python -m pipeline.non_finite {folder}` runs it again."

    def roll_back(self, why: str) -> None:
        """Leave the newest regular checkpoint as the newest."""
        del self.trainer  # before another is made
        self._open.close()
        self.checkpoints.go_back()
        self.say(f"{why}\ngoing back to the last regular checkpoint, at a lower learning rate")


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    files.write_json(file, files.read_json(file) | changes)


def check_disk(num_parameters: int, folder: Path) -> None:
    """Refuse to start what would fill the disk.

    Raises:
        Refusal: with the bytes needed and free.
    """
    weights = 4 * num_parameters
    # Four checkpoints while the newest is written (weights and two moments each); four models in the run's folder, best
    # and last in models/ and in DVC's cache.
    needed = 4 * 3 * weights + (4 + 2 * 2) * weights
    free = shutil.disk_usage(folder).free
    held = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))  # a part of it is there already
    if free + held < needed:
        raise Refusal(
            f"checkpoints and models will take about {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free "
            f"where {folder} lies; make room (`dvc gc --workspace` drops old results) or choose a smaller model"
        )
