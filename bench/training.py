"""Training speed beside Hugging Face Trainer: same model, same tokens, same precision, one after the other, n rounds.

    make bench        # needs the extra `bench`

Each round trains a fresh model of the shape in params.yaml for the same number of optimizer steps with each of the two,
in a process of its own, and times the steps after the first few. The peer gets the same windows of tokens as plain
tensors, the same precision, clipping and optimizer (fused AdamW); it does not isolate documents, which is less work.
Printed: tokens per second, median, least and most of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NUM_WARMUP, NUM_STEPS = 5, 30
NUM_DOCUMENTS, LENGTH, VOCABULARY_SIZE = 4000, 90, 3072


def corpus():  # type: ignore[no-untyped-def]
    """Random tokens in documents as long as the demo's: speed does not depend on what they say."""
    from pipeline.corpus import Corpus

    random = np.random.default_rng(0)
    return Corpus(
        tokens=random.integers(0, VOCABULARY_SIZE - 1, NUM_DOCUMENTS * LENGTH).astype(np.uint16),
        offsets=np.arange(NUM_DOCUMENTS + 1) * LENGTH,
        num_bytes=np.full(NUM_DOCUMENTS, 4 * LENGTH),
        hashes=np.arange(NUM_DOCUMENTS, dtype=np.uint64),
        vocabulary_size=VOCABULARY_SIZE,
        start_id=VOCABULARY_SIZE - 1,
        end_id=VOCABULARY_SIZE - 1,
    )


def setup():  # type: ignore[no-untyped-def]
    """The trainer of this repository, with the parameters of params.yaml."""
    from pipeline import device, stage
    from pipeline import trainer as training

    sections = stage.load_params()
    with device.join_processes(sections["train"]) as place:
        return place, training.make_trainer(
            place, corpus(), np.arange(NUM_DOCUMENTS), sections["model"], sections["train"]
        )


def ours() -> float:
    """Tokens per second of our loop."""
    from pipeline.loop import train_steps

    _, trainer = setup()
    for step in train_steps(trainer, 0):
        if step.step == NUM_WARMUP:
            began, tokens_before = time.perf_counter(), step.num_tokens
        if step.step == NUM_WARMUP + NUM_STEPS:
            return (step.num_tokens - tokens_before) / (time.perf_counter() - began)
    raise AssertionError("too few steps")


def peer() -> float:
    """Tokens per second of transformers.Trainer on the same windows."""
    import torch
    import transformers

    place, trainer = setup()
    params = trainer.params
    # Twice as many steps' windows as are trained: ours may hold a window fewer, and the peer must not run out of them,
    # for its last batch would then be counted as larger than it is.
    windows = [batch for step in range(2 * (NUM_WARMUP + NUM_STEPS)) for batch in [trainer.batches.batch_at(step)]]
    inputs_NT = torch.cat([batch.inputs_BT for batch in windows])
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
            max_steps=NUM_WARMUP + NUM_STEPS,
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            max_grad_norm=params.max_grad_norm,
            optim="adamw_torch_fused",
            bf16=place.precision == "bf16",
            fp16=place.precision == "fp16",
            use_cpu=place.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(trainer.model, arguments, train_dataset=Windows(), callbacks=[Clock()]).train()
    tokens_per_step = params.batch_size * params.gradient_accumulation * params.max_length
    return NUM_STEPS * tokens_per_step / (clock[-1] - clock[NUM_WARMUP - 1])


def main() -> None:
    """Run the rounds, or one measurement in this process."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=["ours", "peer"], help="one measurement, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print({"ours": ours, "peer": peer}[arguments.one]())
        return
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(arguments.rounds):
        for name, speeds in found.items():
            command = [sys.executable, "-m", "bench.training", "--one", name]
            result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{name} failed; is the extra `bench` installed?\n{result.stderr[-800:]}")
            speeds.append(float(result.stdout.split()[-1]))
    for name, label in (("ours", "this pipeline"), ("peer", "transformers.Trainer")):
        speeds = found[name]
        print(f"{label:22} {statistics.median(speeds):8,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})")
    ratio = statistics.median(one / other for one, other in zip(found["ours"], found["peer"], strict=True))
    print(f"ratio, median of {arguments.rounds} rounds: {ratio:.2f}")


if __name__ == "__main__":
    main()
