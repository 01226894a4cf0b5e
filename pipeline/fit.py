"""From the first step to the last: what the training loop's caller does between steps.

`pipeline/loop.py` says what a step is. The plain `for` in `fit` logs it, evaluates, keeps the best weights, saves and
stops. Under torchrun every process runs this; only the first one writes and prints.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline import corpus, device, files, losses, model, stage
from pipeline.batches import Batches
from pipeline.corpus import Corpus, Ints
from pipeline.loop import Step, Trainer, check_isolation, make_optimizer, train_steps
from pipeline.progress import Progress
from pipeline.runs import Checkpoint, Run
from pipeline.stage import Refusal
from pipeline.train import Params


@dataclass
class Standing:
    """How the run stands: what decides about the best weights and about stopping early. In every checkpoint."""

    best_validation_loss: float | None = None
    best_step: int = 0
    num_evaluations_since_best: int = 0

    def take(self, step: int, validation_loss: float) -> bool:
        """Note an evaluation; return whether it is the best so far."""
        if self.best_validation_loss is not None and validation_loss >= self.best_validation_loss:
            self.num_evaluations_since_best += 1
            return False
        self.best_validation_loss, self.best_step, self.num_evaluations_since_best = validation_loss, step, 0
        return True


def fit(
    run: Run, place: device.Place, paths: stage.Paths, base: model.Params, params: Params, about: dict[str, Any]
) -> None:
    """Train to the end and leave the run finished, or stop on a signal and leave it resumable.

    Args:
        about: goes into the training.json of both model folders.

    Raises:
        stage.Interrupted: by SIGINT or SIGTERM, after the state was saved.
        Refusal: what a user can mend, before training or at a non-finite step.
    """
    tokens = corpus.load(paths["tokens"])
    split = {side: corpus.read_side(paths["split"], side, tokens.num_documents) for side in ("train", "validation")}
    measured = {
        "train_eval_loss": losses.fixed_sample(tokens, split["train"], params.evaluation_documents),
        "validation_loss": losses.fixed_sample(tokens, split["validation"], params.evaluation_documents),
    }
    trainer = make_trainer(place, tokens, split["train"], base, params)
    checkpoint = run.newest()
    standing = Standing() if checkpoint is None else restore(trainer, checkpoint)
    first = 0 if checkpoint is None else checkpoint.step
    writer = Writer(run, trainer, paths["tokens"] / "tokenizer", about, first) if place.is_first else None
    if writer:
        writer.start(checkpoint, place)
    if first == 0:
        row = {"step": 0, "epoch": 0.0, "num_tokens": 0} | evaluate(trainer, tokens, measured)
        if writer:
            run.add_row(row)
            writer.say(f"before training: validation loss {row['validation_loss']:.4f}")

    stopped = "finished"
    with signals() as asked:
        for step in train_steps(trainer, first):
            row = asdict(step) | {"epoch": step.step / trainer.batches.steps_per_epoch}
            evaluated = is_evaluation_due(step.step, trainer)
            if evaluated:
                with writer.progress.paused() if writer else contextlib.nullcontext():
                    row |= evaluate(trainer, tokens, measured)
                is_best = standing.take(step.step, row["validation_loss"])
            if writer:
                run.add_row(row)
                writer.progress.advance(step.step, step.loss, step.learning_rate, step.num_tokens)
                if evaluated:
                    writer.close_evaluation(step, row, standing, is_best)
            if 0 < params.early_stopping_patience <= standing.num_evaluations_since_best:
                stopped = "early_stopping"
                break
            if step.step == trainer.num_steps:
                break
            # All processes must stop at the same step, so a signal to any of them counts for all.
            interrupted = any(device.sum_over_processes(asked.number))
            if writer and (interrupted or step.step % params.checkpoint_interval_steps == 0):
                run.save(capture(trainer, standing, step.step))
            if interrupted:
                raise stage.Interrupted(
                    asked.number or signal.SIGTERM,
                    f"stopped after step {step.step} of {trainer.num_steps}; the state is saved in {run.folder}, "
                    "and the same command goes on from there",
                )
    if writer:
        writer.finish(step, row, stopped)


@dataclass
class Writer:
    """What only the first process does: rows, lines, model folders."""

    run: Run
    trainer: Trainer
    tokenizer_folder: Path
    about: dict[str, Any]
    first: int

    def start(self, checkpoint: Checkpoint | None, place: device.Place) -> None:
        """Refuse what cannot end well, cut the rows to the checkpoint, say what is about to happen."""
        check_disk(self.trainer.model, self.run.folder)
        self.run.start_rows(checkpoint.state["num_row_bytes"] if checkpoint else 0)
        batches = self.trainer.batches
        self.progress = Progress(
            self.run.folder, self.first, self.trainer.num_steps, batches.num_tokens_before(self.first)
        )
        if checkpoint:
            self.say(f"going on after step {checkpoint.step} of {self.trainer.num_steps} ({self.run.folder})")
        self.say(
            f"{num_parameters(self.trainer.model):,} parameters on {place.device} ({place.precision}), "
            f"{batches.tokens_per_epoch:,} tokens an epoch, {self.trainer.num_steps} steps of "
            f"{batches.windows_per_step} x {batches.max_length} tokens"
        )

    def say(self, line: str) -> None:
        """Print a line of this stage."""
        self.progress.say(f"train: {line}")

    def close_evaluation(self, step: Step, row: dict[str, Any], standing: Standing, is_best: bool) -> None:
        """Keep the weights if they are the best so far, and say how it stands."""
        if is_best:
            self.save_model(self.run.best, step, row)
        mark = "* new best" if is_best else f"best {standing.best_validation_loss:.4f} at step {standing.best_step}"
        self.say(
            f"epoch {row['epoch']:.4g}/{self.trainer.params.num_epochs}  step {step.step}  "
            f"train {row['train_eval_loss']:.4f}  validation {row['validation_loss']:.4f}  "
            f"gap {row['validation_loss'] - row['train_eval_loss']:+.4f}  {mark}"
        )

    def finish(self, step: Step, row: dict[str, Any], stopped: str) -> None:
        """Write last/, which marks the run as finished."""
        self.progress.close()
        if stopped == "early_stopping":
            print(f"train: stopped early, {self.trainer.params.early_stopping_patience} evaluations without a new best")
        self.save_model(self.run.last, step, row | {"stopped": stopped})

    def save_model(self, folder: Path, step: Step, row: dict[str, Any]) -> None:
        """Write an ordinary model folder: weights, configuration, tokenizer, and how they came about."""
        about = self.about | {
            "num_parameters": num_parameters(self.trainer.model),
            "num_steps": self.trainer.num_steps,
            "num_tokens": step.num_tokens,
            "step": step.step,
            "validation_loss": row["validation_loss"],
        }
        if "stopped" in row:
            about["stopped"] = row["stopped"]
        with files.whole_folder(folder) as beside:
            self.trainer.model.save_pretrained(beside, max_shard_size="1TB")
            files.copy_folder(self.tokenizer_folder, beside)
            config = files.read_json(beside / "tokenizer_config.json")
            files.write_json(
                beside / "tokenizer_config.json",
                config | {"model_max_length": model.num_positions(self.trainer.model.config)},
            )
            files.write_json(beside / "training.json", about)


def make_trainer(place: device.Place, tokens: Corpus, documents: Ints, base: model.Params, params: Params) -> Trainer:
    """Model, optimizer, scaler and batches, at step 0."""
    device.make_deterministic()
    transformers.logging.disable_progress_bar()  # one for writing a file of a second
    initial = model.initial_model(base, params, tokens).to(place.device)
    if params.isolate_documents:
        check_isolation(initial, tokens.vocabulary_size, place.device)
    batches = Batches(
        tokens,
        documents,
        max_length=params.max_length,
        batch_size=params.batch_size,
        gradient_accumulation=params.gradient_accumulation,
        seed=params.seed,
        isolate=params.isolate_documents,
        rank=place.rank,
        world_size=place.world_size,
    )
    return Trainer(
        model=initial,
        engine=DistributedDataParallel(initial) if place.world_size > 1 else initial,
        optimizer=make_optimizer(initial, params),
        scaler=torch.amp.GradScaler(place.device.type, enabled=place.precision == "fp16"),
        batches=batches,
        params=params,
        device=place.device,
        autocast=device.autocast(place.precision, place.device),
    )


def is_evaluation_due(step: int, trainer: Trainer) -> bool:
    """At every epoch's end, and every evaluation_interval_steps if asked."""
    interval = trainer.params.evaluation_interval_steps
    return step % trainer.batches.steps_per_epoch == 0 or (interval > 0 and step % interval == 0)


def evaluate(trainer: Trainer, tokens: Corpus, measured: dict[str, Ints]) -> dict[str, float]:
    """Mean losses of the fixed samples, in nats per predicted token, dropout off; shared out over the processes.

    Raises:
        Refusal: a loss is not a finite number.
    """
    batches, means = trainer.batches, {}
    for name, documents in measured.items():
        found = losses.measure(
            trainer.model,
            tokens,
            documents[batches.rank :: batches.world_size],
            max_length=trainer.params.max_length,
            batch_size=trainer.params.evaluation_batch_size,
            device=trainer.device,
            autocast=trainer.autocast,
        )
        nats, num_tokens = device.sum_over_processes(found.nats.sum(), found.num_tokens.sum())
        means[name] = nats / num_tokens
        if not math.isfinite(means[name]):
            raise Refusal(f"the {name} is {means[name]}: lower train.learning_rate; see docs/guide.md#non_finite")
    return means


def capture(trainer: Trainer, standing: Standing, step: int) -> Checkpoint:
    """Everything that the next step depends on."""
    tensors: dict[str, Tensor] = {}
    updates: dict[str, float] = {}
    for name, weight in trainer.model.named_parameters():
        tensors[f"weight.{name}"] = weight.detach()
        for key, value in trainer.optimizer.state[weight].items():
            if value.ndim:
                tensors[f"{key}.{name}"] = value
            else:  # AdamW counts its updates for each weight; with fp16 they can be fewer than the steps
                updates[name] = float(value)
    state = {"standing": asdict(standing), "scaler": trainer.scaler.state_dict(), "num_updates": updates}
    return Checkpoint(step, tensors, state)


def restore(trainer: Trainer, checkpoint: Checkpoint) -> Standing:
    """Put a checkpoint back into the trainer."""
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            weight.copy_(checkpoint.tensors[f"weight.{name}"])
            if name in checkpoint.state["num_updates"]:
                trainer.optimizer.state[weight] = {
                    "step": torch.tensor(checkpoint.state["num_updates"][name], device=weight.device),
                    "exp_avg": checkpoint.tensors[f"exp_avg.{name}"].to(weight.device),
                    "exp_avg_sq": checkpoint.tensors[f"exp_avg_sq.{name}"].to(weight.device),
                }
    trainer.scaler.load_state_dict(checkpoint.state["scaler"])
    return Standing(**checkpoint.state["standing"])


def num_parameters(trained: torch.nn.Module) -> int:
    """Weights of a model, tied ones counted once."""
    return sum(weight.numel() for weight in trained.parameters())


def check_disk(trained: torch.nn.Module, folder: Path) -> None:
    """Refuse to start what would fill the disk.

    Raises:
        Refusal: with the bytes needed and free.
    """
    weights = 4 * num_parameters(trained)
    # Three checkpoints while the third is written (weights and two moments each); best and last in the run's folder,
    # in models/ and in DVC's cache.
    needed = 3 * 3 * weights + 3 * 2 * weights
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refusal(
            f"checkpoints and models will take about {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free "
            f"where {folder} lies; make room (`dvc gc --workspace` drops old results) or choose a smaller model"
        )


@dataclass
class Asked:
    """The signal that asked the run to stop; 0: none."""

    number: int = 0


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
    """Note the first SIGINT or SIGTERM, to stop between two steps; the second one ends the process at once."""
    asked = Asked()

    def note(number: int, _frame: object) -> None:
        asked.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
