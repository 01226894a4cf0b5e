"""From the first step to the last: what the training loop's caller does between steps.

`pipeline/loop.py` says what a step is. The plain `for` in `attempt` logs it, evaluates, keeps the best weights, saves
and stops. Under torchrun every process runs this; only the first one writes and prints.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from pipeline import bootstrap, corpus, device, losses, memory, model, stage
from pipeline.checkpoints import Checkpoints
from pipeline.corpus import Corpus, Ints
from pipeline.loop import NonFinite, Step, train_steps
from pipeline.losses import DocumentLosses
from pipeline.runs import Run
from pipeline.stage import Refusal
from pipeline.train import Params
from pipeline.trainer import Trainer, make_trainer, restore
from pipeline.writer import Writer


@dataclass
class Standing:
    """How the run stands: what decides about the best weights and about stopping early. In every checkpoint."""

    best_validation_loss: float | None = None
    best_step: int = 0
    num_evaluations_since_best: int = 0
    num_rolled_back: int = 0

    def take(self, step: int, validation_loss: float) -> bool:
        """Note an evaluation; return whether it is the best so far."""
        if self.best_validation_loss is not None and validation_loss >= self.best_validation_loss:
            self.num_evaluations_since_best += 1
            return False
        self.best_validation_loss, self.best_step, self.num_evaluations_since_best = validation_loss, step, 0
        return True


@dataclass(frozen=True)
class Back:
    """The step that a run goes back to, and how often it has gone back, this time included."""

    step: int
    num_times: int


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
    config = model.initial_config(base, params, tokens.vocabulary_size, tokens.start_id, tokens.end_id)
    fitting = memory.fitting(place, config, params)
    checkpoints = Checkpoints(run.folder, run.rows_file, params.checkpoint_interval_steps)
    writer = Writer(run, checkpoints, paths["tokens"], params, about) if place.is_first else None
    back: Back | None = Back(0, 0)
    with signals() as asked, writer or contextlib.nullcontext():
        while back is not None:
            back = attempt(
                make_trainer(place, tokens, split["train"], base, params),
                checkpoints, writer, tokens, measured, asked, back, fitting,
            )  # fmt: skip


def attempt(
    trainer: Trainer,
    checkpoints: Checkpoints,
    writer: Writer | None,
    tokens: Corpus,
    measured: dict[str, Ints],
    asked: Asked,
    back: Back,
    fitting: int,
) -> Back | None:
    """Train from the newest checkpoint to the end.

    Args:
        fitting: windows a forward pass that memory holds.

    Returns:
        None; or, where train.non_finite says so and a step was not finite, where to go back to, to try again at a lower
        rate.
    """
    params = trainer.params
    checkpoint = checkpoints.newest()
    standing = Standing() if checkpoint is None else Standing(**checkpoint.state["standing"])
    first = checkpoint.step if checkpoint else 0
    if first == back.step:  # where that one is damaged, the steps from the one before up to it come at their own rate
        standing.num_rolled_back = max(standing.num_rolled_back, back.num_times)
    trainer.rate_factor = params.roll_back_factor**standing.num_rolled_back
    if checkpoint:
        restore(trainer, checkpoint.tensors, checkpoint.state["trainer"])
        checkpoint.tensors.clear()  # their memory
    micro_batch_size = trainer.micro_batch_size
    trainer.micro_batch_size = min(micro_batch_size, fitting)
    if writer:
        writer.start(trainer, checkpoint)

    def stop() -> bool:  # several processes can stop together alone, between two steps
        return asked.number != 0 and trainer.batches.world_size == 1

    def interrupt(where: str, saved: str) -> NoReturn:
        if writer:
            writer.background.wait()
        raise stage.Interrupted(
            asked.number or signal.SIGTERM, f"stopped {where}; {saved}, and the same command goes on from there"
        )

    if first == 0:
        try:
            row = {"step": 0, "epoch": 0.0, "num_tokens": 0} | evaluate(trainer, 0, tokens, measured, stop)
        except losses.Stopped:
            interrupt("before the first step", "nothing is trained yet")
        if writer:
            writer.add_first_row(row)

    pending = checkpoint.state["pending"] if checkpoint else None  # a step that was stopped while it was measured
    try:
        for step in itertools.chain([Step(**pending)] if pending else [], train_steps(trainer, first)):
            row = {name: value for name, value in asdict(step).items() if value is not None}
            row["epoch"] = step.step / trainer.batches.steps_per_epoch
            if step.micro_batch_size == micro_batch_size:
                del row["micro_batch_size"]  # only where it changes
            micro_batch_size = step.micro_batch_size
            is_best = False
            if is_evaluation_due(step.step, trainer):
                try:
                    with writer.progress.paused() if writer else contextlib.nullcontext():
                        row |= evaluate(trainer, step.step, tokens, measured, stop)
                except losses.Stopped:
                    if writer and step.step > first:
                        writer.save(row, standing, best=False, checkpoint=True, pending=step)
                    interrupt(
                        f"while measuring after step {step.step} of {trainer.num_steps}",
                        f"the state is saved in {checkpoints.folder}",
                    )
                is_best = standing.take(step.step, row["validation_loss"])
            is_early = 0 < params.early_stopping_patience <= standing.num_evaluations_since_best
            is_end = is_early or step.step == trainer.num_steps
            # All processes must stop at the same step, so a signal to any of them counts for all.
            interrupted = not is_end and device.any_process(asked.number != 0)
            if writer:
                writer.add_row(step, row, standing, is_best)
                is_due = interrupted or step.step % params.checkpoint_interval_steps == 0
                is_due = is_due and not is_end and step.step > first
                if is_best or is_due:
                    writer.save(row, standing, best=is_best, checkpoint=is_due)
            if interrupted:
                interrupt(
                    f"after step {step.step} of {trainer.num_steps}", f"the state is saved in {checkpoints.folder}"
                )
            if is_end:
                break
    except NonFinite as problem:
        evidence = writer.keep_evidence(problem) if writer else ""
        if params.non_finite != "roll_back" or standing.num_rolled_back == params.max_non_finite:
            raise Refusal(f"{problem}{evidence}") from None
        if writer:
            writer.roll_back(f"{problem}{evidence}")
        device.wait_for_processes()
        return Back(checkpoints.regular_step(), standing.num_rolled_back + 1)
    if writer:
        writer.finish(row, "early_stopping" if is_early else "finished")
    return None


def is_evaluation_due(step: int, trainer: Trainer) -> bool:
    """At every epoch's end, and every evaluation_interval_steps if asked."""
    interval = trainer.params.evaluation_interval_steps
    return step % trainer.batches.steps_per_epoch == 0 or (interval > 0 and step % interval == 0)


def evaluate(
    trainer: Trainer, step: int, tokens: Corpus, measured: dict[str, Ints], stop: Callable[[], bool]
) -> dict[str, Any]:
    """Mean losses of the fixed samples, in nats per predicted token, dropout off; and how sure that of validation is.

    Raises:
        Refusal: a loss is not a finite number.
        losses.Stopped: `stop`, asked before every forward pass, said so.
    """
    found = {name: measure(trainer, tokens, documents, stop) for name, documents in measured.items()}
    means: dict[str, Any] = {name: each.mean for name, each in found.items()}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise Refusal(f"the {name} is {mean}: lower train.learning_rate; see docs/guide.md#non_finite")
    num_samples, key = trainer.params.evaluation_bootstrap_samples, (trainer.params.seed, step)
    resampled = bootstrap.means(found["validation_loss"].nats, found["validation_loss"].num_tokens, num_samples, key)
    return means | {"validation_loss_ci95": bootstrap.interval(resampled)}


def measure(trainer: Trainer, tokens: Corpus, documents: Ints, stop: Callable[[], bool]) -> DocumentLosses:
    """Losses of the documents, shared out over the processes; in the end all of them have all."""
    batches = trainer.batches
    ours = slice(batches.rank, None, batches.world_size)
    found = losses.measure(
        trainer.model,
        tokens,
        documents[ours],
        max_length=trainer.params.max_length,
        batch_size=trainer.params.evaluation_batch_size,
        device=trainer.device,
        stop=stop,
    )
    nats_D = torch.zeros(len(documents), dtype=torch.float64)
    num_tokens_D = torch.zeros(len(documents), dtype=torch.int64)
    nats_D[ours], num_tokens_D[ours] = torch.from_numpy(found.nats), torch.from_numpy(found.num_tokens)
    device.sum_over_processes(nats_D, num_tokens_D)
    return DocumentLosses(documents, nats_D.numpy(), num_tokens_D.numpy())


@dataclass
class Asked:
    """The signal that asked the run to stop; 0: none."""

    number: int = 0


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
    """Note the first SIGINT or SIGTERM, to stop after the step or the forward pass; a second one ends all at once."""
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
