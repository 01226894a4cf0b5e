"""A corpus and parameters so small that a training run takes a second."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline import corpus, files
from pipeline.train import Params

VOCABULARY_SIZE = 64
END_ID = 63

PARAMS: dict[str, Any] = {
    "scratch": {"num_layers": 2, "num_heads": 2, "embedding_size": 16},
    "max_length": 16,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "micro_batch_size": "auto",
    "num_epochs": 2,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "dropout": 0.1,
    "non_finite": "stop",
    "max_non_finite": 3,
    "roll_back_factor": 0.5,
    "mixed_precision": "none",
    "isolate_documents": True,
    "evaluation_interval_steps": 0,
    "evaluation_documents": 10,
    "evaluation_batch_size": 4,
    "evaluation_bootstrap_samples": 100,
    "early_stopping_patience": 0,
    "checkpoint_interval_steps": 10,
    "device": "cpu",
    "num_workers": 0,
    "seed": 1,
}


def params(**changes: Any) -> Params:
    return Params.model_validate(PARAMS | changes)


def write_tokens(folder: Path, lengths: list[int], seed: int = 0) -> corpus.Corpus:
    """A token folder with documents of these lengths; each counts up from a random number, which is easily learned."""
    random = np.random.default_rng(seed)
    documents = [(random.integers(END_ID) + np.arange(length)) % END_ID for length in lengths]
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "num_bytes.npy", np.asarray(lengths, np.int64) * 2)
    np.save(folder / "hashes.npy", random.integers(0, 2**63, len(lengths)).astype(np.uint64))
    files.write_json(folder / "tokens.json", {"vocabulary_size": VOCABULARY_SIZE, "start_id": END_ID, "end_id": END_ID})
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(END_ID)} | {"<|endoftext|>": END_ID}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    files.write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    )
    return corpus.load(folder)


def write_split(folder: Path, num_documents: int) -> None:
    """Every fifth document validates, every fifth tests, the others train."""
    folder.mkdir(parents=True)
    documents = np.arange(num_documents)
    for side, chosen in {
        "train": documents % 5 > 1,
        "validation": documents % 5 == 0,
        "test": documents % 5 == 1,
    }.items():
        np.save(folder / f"{side}.npy", documents[chosen])


ROOT = Path(__file__).parent.parent


class Project:
    """A copy of the code in a folder of its own, with tiny data and parameters, to run stages in as processes."""

    def __init__(self, folder: Path, num_documents: int = 60, **changes: Any) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", "params.yaml", "requirements.lock"):
            shutil.copy(ROOT / name, folder)
        self.set_params(train=PARAMS | changes)
        lengths = [5, 12, 9, 20, 7, 15]
        write_tokens(folder / "data" / "tokens", (lengths * num_documents)[:num_documents])
        write_split(folder / "data" / "split", num_documents)

    def set_params(self, **sections: Any) -> None:
        """Replace keys of sections of params.yaml."""
        file = self.folder / "params.yaml"
        yaml = YAML()
        content = yaml.load(file)
        for section, changes in sections.items():
            content[section].update(changes)
        yaml.dump(content, file)

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """Start `python -m ...` in the project."""
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=self.folder, text=True, env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run `python -m ...` in the project to its end."""
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of everything that training writes."""
        return {
            name: files.sha256_of(self.folder / name) for name in ("models/best", "models/last", "reports/train.jsonl")
        }
