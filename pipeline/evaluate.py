"""evaluate: how good the model is, how sure that is, and what to do next.

In:  models/best and models/last, the tokens, the documents of each split, the rows of train.jsonl, and for the verdict
     the samples and what was found of leakage.
Out: evaluation.json (losses with 95 % intervals beside baselines), diagnostics.json (the verdict), documents.parquet
     (the loss of every validation and test document), curves/ (tables for `dvc plots show`) and three pictures:
     loss_curve.png, document_losses.png and calibration.png.

    python -m pipeline.evaluate

Losses are in nats per predicted token, every token weighing the same, and always computed in float32, whatever
precision training used: so two evaluations differ by their weights alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline import bootstrap, corpus, curves, diagnose, files, stage
from pipeline.bootstrap import Floats, interval, number
from pipeline.thresholds import Thresholds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.calibration import Calibration
    from pipeline.corpus import Corpus
    from pipeline.losses import DocumentLosses
    from pipeline.model import Params as ModelParams
    from pipeline.train import Params as TrainParams

Ints = npt.NDArray[np.int64]

HELD_OUT = ("validation", "test")
TOKENS_AT_ONCE = 2**22  # counted in one go: bounds memory for a corpus of any size


class Params(stage.Params):
    """Section `evaluate` of params.yaml; its comments there say what each means."""

    batch_size: int = Field(ge=1)
    bootstrap_samples: int = Field(ge=100)
    thresholds: Thresholds
    seed: int = Field(ge=0, lt=2**32)

    def watch(self, rows_file: Path) -> diagnose.Watch:
        """What names the verdicts while training goes on. The trainer comes by it without importing a module of this
        stage: see ARCHITECTURE.md."""
        return diagnose.Watch(rows_file, self.thresholds)


def summary(losses: DocumentLosses, tokens: Corpus, means: Floats) -> dict[str, Any]:
    """The numbers of one side. Its bits per byte are all its nats, EOS included, over the UTF-8 bytes of its text."""
    num_bytes = int(tokens.num_bytes[losses.documents].sum())
    return {
        "loss": number(losses.mean),
        "loss_ci95": interval(means),
        "perplexity": perplexity(losses.mean),
        "bits_per_byte": number(float(losses.nats.sum()) / math.log(2) / num_bytes),
        "num_tokens": int(losses.num_tokens.sum()),
        "num_documents": len(losses.documents),
    }


def perplexity(loss: float | None) -> float | None:
    """The exponential of a loss; None where it is not finite or too large for a float."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def unigram_losses(tokens: Corpus, train_documents: Ints, sides: Mapping[str, Ints]) -> dict[str, float]:
    """Mean loss of a model that knows only how frequent each token is in training, add-one smoothed (Laplace)."""
    train_counts = token_counts(tokens, train_documents)
    nats = np.log(train_counts.sum() + len(train_counts)) - np.log(train_counts + 1)
    counts = {side: token_counts(tokens, documents) for side, documents in sides.items()}
    # counts @ nats would be BLAS, whose last digit depends on the processor's model.
    return {side: float((counts[side] * nats).sum() / counts[side].sum()) for side in sides}


def token_counts(tokens: Corpus, documents: Ints) -> Ints:
    """How often each id of the vocabulary is predicted in the documents; EOS once a document."""
    chosen = np.zeros(tokens.num_documents, bool)
    chosen[documents] = True
    lengths = tokens.lengths
    counts = np.zeros(tokens.vocabulary_size, np.int64)
    # Whole documents, about TOKENS_AT_ONCE tokens of them a block.
    borders = np.searchsorted(tokens.offsets, np.arange(0, tokens.offsets[-1], TOKENS_AT_ONCE))
    borders = np.unique([0, *borders, tokens.num_documents])
    for first, end in itertools.pairwise(borders):
        block = tokens.tokens[tokens.offsets[first] : tokens.offsets[end]]
        inside = np.repeat(chosen[first:end], lengths[first:end])
        counts += np.bincount(block[inside], minlength=tokens.vocabulary_size)
    counts[tokens.end_id] += len(documents)
    return counts


def same_weights(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same weights."""
    ours, theirs = ({p.name: files.sha256_of(p) for p in folder.glob("*.safetensors")} for folder in (one, other))
    return ours == theirs


def write_documents(path: Path, tokens: Corpus, measured: Mapping[str, DocumentLosses]) -> None:
    """Every held-out document a row: what a paired comparison of two models needs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sides = [(side, measured[side]) for side in HELD_OUT]
    documents = np.concatenate([losses.documents for _, losses in sides])
    table = pa.table(
        {
            "side": [side for side, losses in sides for _ in losses.documents],
            "document": documents,
            "hash": [f"{value:016x}" for value in tokens.hashes[documents]],  # the SHA-256's first 8 bytes
            "num_tokens": np.concatenate([losses.num_tokens for _, losses in sides]),
            "num_bytes": tokens.num_bytes[documents],
            "nats": np.concatenate([losses.nats for _, losses in sides]),
        }
    )
    with files.whole_file(path) as beside:
        pq.write_table(table, beside)


def measure_sides(
    model: PreTrainedModel,
    tokens: Corpus,
    sides: Mapping[str, Ints],
    evaluate: Params,
    train: TrainParams,
    label: str,
    calibrations: Mapping[str, Calibration],
) -> dict[str, DocumentLosses]:
    """Losses of one model on the documents of each side, on the device and in the window of training, in float32.

    The predictions of the sides that have a Calibration are counted there.
    """
    from pipeline import device, losses

    place = device.choose(train.device)
    model.to(place)
    return {
        side: losses.measure(
            model,
            tokens,
            documents,
            max_length=train.max_length,
            batch_size=evaluate.batch_size,
            device=place,
            progress=f"{label}, {side}",
            calibration=calibrations.get(side),
        )
        for side, documents in sides.items()
    }


def evaluation_of(
    tokens: Corpus,
    best: Mapping[str, DocumentLosses],
    calibrations: Mapping[str, Calibration],
    baselines: Mapping[str, Mapping[str, float]],
    evaluate: Params,
) -> dict[str, Any]:
    """The content of evaluation.json.

    Besides validation and test: `train`, the same numbers for the training documents whose loss the loop follows;
    `calibration_error` of each held-out side; `generalisation_gap`, validation minus training loss; `baselines`, for
    each held-out side the loss of every other model.
    """
    means = {
        side: bootstrap.means(losses.nats, losses.num_tokens, evaluate.bootstrap_samples, (evaluate.seed, order))
        for order, (side, losses) in enumerate(best.items())
    }
    sides = {side: summary(losses, tokens, means[side]) for side, losses in best.items()}
    for side, calibration in calibrations.items():
        sides[side]["calibration_error"] = number(calibration.error)
    return sides | {
        "baselines": {side: {name: number(loss) for name, loss in baselines[side].items()} for side in HELD_OUT},
        "generalisation_gap": {
            "loss": number(best["validation"].mean - best["train"].mean),
            "loss_ci95": interval(means["validation"] - means["train"]),
        },
    }


def describe(evaluation: Mapping[str, Any], diagnosis: Mapping[str, Any]) -> str:
    """What came out, in three lines."""
    lines = []
    for side in HELD_OUT:
        found = evaluation[side]
        low, high = (perplexity(end) for end in found["loss_ci95"])
        if None in (found["loss"], found["perplexity"], low, high):
            lines.append(f"evaluate: {side} loss {found['loss']}: no finite perplexity")
        else:
            lines.append(
                f"evaluate: {side} loss {found['loss']:.3f}, perplexity {found['perplexity']:.2f} "
                f"(95 % interval {low:.2f} to {high:.2f})"
            )
    return "\n".join([*lines, f"evaluate: {diagnosis['verdict']}. {diagnosis['because']}"])


def main(paths: stage.Paths, evaluate: Params, model: ModelParams, train: TrainParams) -> None:
    """Measure the models, judge the run, draw its curves."""
    from pipeline import device, held_out_pictures, losses, pictures
    from pipeline.calibration import Calibration
    from pipeline.model import initial_model, load_trained

    device.make_deterministic()
    tokens = corpus.load(paths["tokens"])
    train_documents = corpus.read_side(paths["split"], "train", tokens.num_documents)
    held_out = {side: corpus.read_side(paths["split"], side, tokens.num_documents) for side in HELD_OUT}
    followed = losses.fixed_sample(tokens, train_documents, train.evaluation_documents)

    def measure(
        loaded: PreTrainedModel, sides: Mapping[str, Ints], label: str, **calibrations: Calibration
    ) -> dict[str, DocumentLosses]:
        return measure_sides(loaded, tokens, sides, evaluate, train, label, calibrations)

    calibrations = {side: Calibration() for side in HELD_OUT}
    best = measure(load_trained(paths["best"]), held_out | {"train": followed}, "best model", **calibrations)
    # Most runs end with their best weights; then there is nothing more to measure.
    same = same_weights(paths["best"], paths["last"])
    last = best if same else measure(load_trained(paths["last"]), held_out, "last model")
    initial = measure(initial_model(model, train, tokens), held_out, "initial model")
    unigram = unigram_losses(tokens, train_documents, held_out)
    baselines = {
        side: {"unigram": unigram[side], "initial": initial[side].mean, "last": last[side].mean} for side in HELD_OUT
    }

    rows = files.read_jsonl(paths["train.jsonl"])
    evaluation = evaluation_of(tokens, best, calibrations, baselines, evaluate)
    leakage, samples = files.read_json(paths["leakage.json"], *HELD_OUT), files.read_jsonl(paths["samples.jsonl"])
    diagnosis = diagnose.judge(rows, evaluation, leakage, samples, evaluate.thresholds)
    # The verdict is here too, so that `dvc metrics diff` and `dvc exp show` have it beside the losses.
    files.write_json(paths["evaluation.json"], evaluation | {"verdict": diagnosis["verdict"]})
    files.write_json(paths["diagnostics.json"], diagnosis)
    write_documents(paths["documents.parquet"], tokens, best)
    with files.whole_folder(paths["curves"]) as folder:
        files.write_text(folder / "training.csv", curves.to_csv(curves.training(rows)))
        files.write_text(folder / "evaluations.csv", curves.to_csv(curves.evaluations(rows)))
    with files.whole_file(paths["loss_curve.png"]) as picture:
        pictures.loss_curve(rows, evaluation, diagnosis, picture)
    with files.whole_file(paths["document_losses.png"]) as picture:
        held_out_pictures.document_losses(best, picture)
    with files.whole_file(paths["calibration.png"]) as picture:
        held_out_pictures.reliability(calibrations["test"], picture)
    print(describe(evaluation, diagnosis))


if __name__ == "__main__":
    stage.run("evaluate", main)
