"""Training speed beside Hugging Face Trainer: same model, same tokens, one after the other, n rounds.

    make bench                                  # GPT-2 (124M) at 4 x 512; needs the extra `bench`
    python -m bench.training --shape params     # the model and the batch of params.yaml

Each measurement is a process of its own: it makes a fresh model, trains the same windows of random tokens for some
steps and times those after the first. The peer is transformers.Trainer as it comes (fused AdamW, clipping at 1) in
float32 and with --bf16; it does not isolate documents, which is less work. Ours runs as `python -m pipeline.train`
does: in the precision that mixed_precision: auto chooses, documents isolated, every algorithm deterministic.
Printed: seconds a step and tokens a second, median, least and most of the rounds; how many times as fast ours is.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 300  # tokens of a document
GPT2 = {
    "scratch": {"num_layers": 12, "num_heads": 12, "embedding_size": 768},
    "max_length": 512,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "learning_rate": 5e-5,
}
VOCABULARY = {"gpt2": 50257, "params": 3072}
NUM_STEPS = {"gpt2": (1, 3), "params": (5, 30)}  # before the clock runs, and while it runs
# What is measured: who, in which precision ("auto": ours chooses), with which dropout.
PEERS = {"as it comes": ("none", 0.1), "--bf16": ("bf16", 0.1), "--bf16, dropout 0": ("bf16", 0.0)}


def setup(shape: str, precision: str, dropout: float) -> Any:
    """The trainer of this repository."""
    from pipeline import device, stage, trainer
    from pipeline.corpus import Corpus

    sections = stage.load_params()
    params = sections["train"].model_copy(
        update={"dropout": dropout, "mixed_precision": precision, "num_epochs": 1000}
        | ({**GPT2, "scratch": type(sections["train"].scratch)(**GPT2["scratch"])} if shape == "gpt2" else {})
    )
    num_documents = 200
    random, vocabulary_size = np.random.default_rng(0), VOCABULARY[shape]
    corpus = Corpus(  # random tokens: speed does not depend on what they say
        tokens=random.integers(0, vocabulary_size - 1, num_documents * LENGTH).astype(np.uint16),
        offsets=np.arange(num_documents + 1) * LENGTH,
        num_bytes=np.full(num_documents, 4 * LENGTH),
        hashes=np.arange(num_documents, dtype=np.uint64),
        vocabulary_size=vocabulary_size,
        start_id=vocabulary_size - 1,
        end_id=vocabulary_size - 1,
    )
    with device.join_processes(params) as place:
        return trainer.make_trainer(place, corpus, np.arange(num_documents), sections["model"], params)


def ours(shape: str, precision: str, dropout: float) -> float:
    """Seconds a full step of our loop."""
    from pipeline import launcher

    launcher.settle()
    from pipeline.loop import train_steps

    num_before, num_timed = NUM_STEPS[shape]
    trainer = setup(shape, precision, dropout)
    trainer.batches.windows_at = lambda step: range(trainer.batches.windows_per_step)  # every step full, as the peer's
    for step in train_steps(trainer, 0):
        if step.step == num_before:
            began = time.perf_counter()
        if step.step == num_before + num_timed:
            return (time.perf_counter() - began) / num_timed
    raise AssertionError("too few steps")


def peer(shape: str, precision: str, dropout: float) -> float:
    """Seconds a step of transformers.Trainer on such windows."""
    import torch
    import transformers

    num_before, num_timed = NUM_STEPS[shape]
    trainer = setup(shape, "none", dropout)
    params, config = trainer.params, trainer.model.config
    windows = [trainer.batches.batch_at(step).inputs_BT for step in range(2 * (num_before + num_timed))]
    inputs_NT = torch.cat(windows)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(config.to_dict()))
    torch.use_deterministic_algorithms(False)  # as the peer comes
    clock: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **options):  # type: ignore[no-untyped-def]
            clock.append(time.perf_counter())

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(inputs_NT)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": inputs_NT[index], "labels": inputs_NT[index]}

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=params.batch_size,
            gradient_accumulation_steps=params.gradient_accumulation,
            max_steps=num_before + num_timed,
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            bf16=precision == "bf16",
            use_cpu=trainer.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model, arguments, train_dataset=Windows(), callbacks=[Clock()]).train()
    return (clock[-1] - clock[num_before - 1]) / num_timed


def main() -> None:
    """Run the rounds, or one measurement in this process."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=sorted(VOCABULARY), default="gpt2")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "PRECISION", "DROPOUT"), help="one measurement, here")
    arguments = parser.parse_args()
    shape = arguments.shape
    if arguments.one:
        who, precision, dropout = arguments.one
        print({"ours": ours, "peer": peer}[who](shape, precision, float(dropout)))
        return
    found: dict[tuple[str, str, float], list[float]] = {}
    for _ in range(arguments.rounds):
        for precision, dropout in PEERS.values():
            for one in (("peer", precision, dropout), ("ours", "auto", dropout)):
                found.setdefault(one, []).append(measure(shape, *one))
    tokens = {"gpt2": 4 * 512}.get(shape) or tokens_of_a_step()
    for name, (precision, dropout) in PEERS.items():
        theirs, mine = found["peer", precision, dropout], found["ours", "auto", dropout]
        for label, seconds in ((f"Trainer {name}", theirs), (f"this pipeline, dropout {dropout}", mine)):
            print(
                f"{label:30} {statistics.median(seconds):7.2f} s a step ({min(seconds):.2f} to {max(seconds):.2f})  "
                f"{tokens / statistics.median(seconds):7,.0f} tokens/s"
            )
        print(f"{'':30} {statistics.median(theirs) / statistics.median(mine):7.2f} times as fast")


def measure(shape: str, who: str, precision: str, dropout: float) -> float:
    """Seconds a step, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.training", "--shape", shape, "--one", who, precision, str(dropout)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{who} failed; is the extra `bench` installed?\n{done.stderr[-800:]}")
    return float(done.stdout.split()[-1])


def tokens_of_a_step() -> int:
    """Tokens of a full step with params.yaml."""
    from pipeline import stage

    params = stage.load_params()["train"]
    return int(params.batch_size * params.gradient_accumulation * params.max_length)


if __name__ == "__main__":
    main()
