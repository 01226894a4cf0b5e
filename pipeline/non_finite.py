"""What a step saw whose loss or gradient was not a finite number, and the command that runs this step again.

    python -m pipeline.non_finite .runs/0123456789abcdef/non_finite-00000142

The folder holds the state before the step (as a checkpoint), and in step.json its documents, tokens, loss and the
gradient norm of every weight. The command builds the trainer from them, runs the step once more and prints where the
first number that is not finite appears: in the weights, in a layer's output, or only in the gradients.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files, stage
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.batches import Batches
    from pipeline.loop import NonFinite
    from pipeline.trainer import Trainer

NUM_CHARACTERS = 300  # of each document shown
STEP = "step.json"


def keep(run_folder: Path, trainer: Trainer, problem: NonFinite, tokens_folder: Path) -> Path:
    """Write the folder; called while the gradients of the step are still there."""
    from tokenizers import Tokenizer

    from pipeline import checkpoints
    from pipeline.trainer import capture

    batch = _of_all_processes(trainer.batches).batch_at(problem.step)  # of all processes
    tokenizer = Tokenizer.from_file(str(tokens_folder / "tokenizer" / "tokenizer.json"))
    corpus = trainer.batches.corpus
    documents = [
        {
            "document": int(number),
            "sha256_begins": f"{int(corpus.hashes[number]):016x}",
            "text": tokenizer.decode(corpus.tokens[slice(*corpus.offsets[number : number + 2])].tolist())[
                :NUM_CHARACTERS
            ],
        }
        for number in trainer.batches.documents_at(problem.step)
    ]
    gradients = trainer.masters.named_gradients()
    folder = run_folder / f"non_finite-{problem.step + 1:08d}"
    tensors, state = capture(trainer)
    with files.whole_folder(folder) as beside:
        checkpoints.write(beside, tensors, state)
        files.write_json(
            beside / STEP,
            {
                "step": problem.step,
                "loss": repr(problem.loss),
                "grad_norm": repr(problem.grad_norm),
                "grad_norms": {name: repr(float(gradient.norm())) for name, gradient in gradients.items()},
                "learning_rate_factor": trainer.rate_factor,
                "documents": documents,
                "windows": batch.windows,
                "tokens_BT": batch.inputs_BT.tolist(),
                "tokens_sha256": _sha256(batch.inputs_BT),
            },
        )
    return folder


def replay(folder: Path) -> list[str]:
    """Run the step again; returns lines that say what came of it and where it began.

    Raises:
        Refusal: the folder is damaged, or data or parameters have changed since.
    """
    from pipeline import checkpoints, corpus, device, loop
    from pipeline.trainer import make_trainer, restore

    if not (folder / STEP).is_file():
        raise Refusal(f"{folder} holds no {STEP}: name a folder non_finite-... of an unfinished run in .runs")
    seen = files.read_json(folder / STEP)
    try:
        tensors, state = checkpoints.read(folder)
    except ValueError as problem:
        raise Refusal(f"{folder} is damaged: {problem}") from None
    sections, paths = stage.load_params(), stage.paths_of(stage.read_stages()["train"])
    with device.join_processes(sections["train"]) as place:
        tokens = corpus.load(paths["tokens"])
        documents = corpus.read_side(paths["split"], "train", tokens.num_documents)
        trainer = make_trainer(place, tokens, documents, sections["model"], sections["train"])
        batch = trainer.batches.batch_at(seen["step"])
        if _sha256(batch.inputs_BT) != seen["tokens_sha256"]:
            raise Refusal(
                f"{folder}: data or parameters have changed since, so step {seen['step'] + 1} has other tokens"
            )
        restore(trainer, tensors, state)
        trainer.rate_factor = seen["learning_rate_factor"]
        found: list[str] = [
            f"the weight {name} is not finite before the step"
            for name, view in trainer.masters.named_weights().items()
            if not view.isfinite().all()
        ]
        _watch(trainer.model, found)
        try:
            done = loop.train_step(trainer, seen["step"], batch)
        except loop.NonFinite as problem:
            lines = [str(problem), *found[:1]]
            if not found:
                gradients = trainer.masters.named_gradients()
                lines += [
                    f"the gradient of {name} is not finite" for name, g in gradients.items() if not g.isfinite().all()
                ]
            return lines
        return [f"step {done.step} is finite now: loss {done.loss}, gradient norm {done.grad_norm}"]


def _of_all_processes(batches: Batches) -> Batches:
    """The same batches as one process alone has them."""
    alone = copy.copy(batches)
    alone.rank, alone.world_size = 0, 1
    return alone


def _sha256(tokens_BT: Tensor) -> str:
    return hashlib.sha256(tokens_BT.numpy().tobytes()).hexdigest()


def _watch(model: Any, found: list[str]) -> None:
    """Note each layer whose output is not finite, in the order of the forward pass."""

    def look(name: str) -> Any:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            if hasattr(tensor, "isfinite") and not tensor.isfinite().all():
                found.append(f"the first output that is not finite is that of {name or type(model).__name__}")

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.non_finite", description="Run such a step again.")
    parser.add_argument("folder", type=Path, help="a folder non_finite-... below .runs")
    folder = parser.parse_args().folder
    with stage.refusals("non_finite"):
        lines = replay(folder)
        print("\n".join(lines))


if __name__ == "__main__":
    main()
