"""A repository in which every stage but publish has run, with files so small that they cost nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipeline import files, publish, stage

ROOT = Path(__file__).parent.parent
END = "<|endoftext|>"
FINGERPRINT = "0123456789abcdef" * 4
NUM_STEPS, BEST_STEP, POSITIONS = 12, 8, 24
TEXTS = ["The old fox sleeps.", "Once upon a time there was a hen.", "In the morning, it rains.", "She opened the box."]
# Of the fixture `texts`: enough to compare models on.
WORDS = ["the", "old", "fox", "hen", "rain", "morning", "box", "she", "opened", "sleeps", "once", "upon", "a", "time"]
NUM_TEXTS, FIRST_TEST = 40, 20


def rows(num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    """The rows of a training that evaluates every fourth step."""
    found: list[dict[str, Any]] = [
        {"step": 0, "epoch": 0.0, "num_tokens": 0, "train_eval_loss": 6.0, "validation_loss": 6.25}
    ]
    for step in range(1, num_steps + 1):
        row = {"step": step, "epoch": step / 12, "loss": 6 - step / 7, "learning_rate": 1e-3 / step, "grad_norm": 1.1}
        row["num_tokens"] = 100 * step
        if step % 4 == 0:
            row |= {"train_eval_loss": 6 - step / 9, "validation_loss": 6.25 - step / 11}
        found.append(row)
    return found


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def write(folder: Path, seed: int = 0) -> Path:
    """Write the repository; the seed decides the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", "params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("auto_promote: true", "auto_promote: false"))
    vocabulary_size = write_tokens(folder / "data" / "tokens")
    (folder / "data" / "split").mkdir()
    for number, side in enumerate(("train", "validation", "test")):
        np.save(folder / "data" / "split" / f"{side}.npy", np.array([0, 3] if number == 0 else [number]))
    write_model(folder / "models" / "best", folder / "data" / "tokens" / "tokenizer", vocabulary_size, seed)
    reports = folder / "reports"
    for name in ("ingest", "clean", "tokenize", "split"):
        files.write_json(reports / f"{name}.json", {"stage": name})
    shared = {f"{kind}_{what}": 0 for kind in ("exact", "near_duplicate", "ngram") for what in ("documents", "tokens")}
    sizes = {"num_documents": 1, "num_tokens": 9}
    leakage = {"ngram_size": 13, "near_duplicate_similarity": 0.8, "validation": sizes | shared, "test": sizes | shared}
    files.write_json(reports / "leakage.json", leakage)
    files.write_text(reports / "train.jsonl", jsonl(rows()))
    files.write_text(reports / "curves" / "training.csv", "step,loss\n")
    numbers = {"perplexity": 200.3, "bits_per_byte": 2.1, "num_tokens": 9, "num_documents": 1, "loss_ci95": [5.0, 5.6]}
    sides = ("validation", "test", "train")
    evaluation = {side: {"loss": 5.3 + number / 10} | numbers for number, side in enumerate(sides)}
    evaluation["baselines"] = {side: {"unigram": 6.1, "initial": 6.2, "last": 5.3} for side in ("validation", "test")}
    files.write_json(reports / "evaluation.json", evaluation)
    diagnosis = {"verdict": "healthy", "evidence": {}, "advice": ["Train longer."], "guide": "docs/guide.md#healthy"}
    diagnosis["because"] = "Validation loss went down and levelled off."
    files.write_json(reports / "diagnostics.json", diagnosis | {"findings": [diagnosis]})
    samples = [{"prompt": text[:8], "text": text + "\nIt\tis so.", "memorised": False} for text in TEXTS]
    for sample in samples:
        sample |= {"continuation": sample["text"][8:], "method": "greedy", "longest_overlap_num_tokens": 3}
    files.write_text(reports / "samples.jsonl", jsonl(samples))
    for name in ("samples.md", "documents.parquet", "loss_curve.png", "document_losses.png", "calibration.png"):
        files.write_text(reports / name, name)
    return folder


def write_tokens(folder: Path, texts: list[str] = TEXTS) -> int:
    """Tokens of the texts, and a byte-level tokenizer trained on them; returns the size of its vocabulary."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, show_progress=False, special_tokens=[END])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    files.write_json(folder / "tokenizer" / "tokenizer_config.json", about)
    ids = [tokenizer.encode(text).ids for text in texts]
    (folder / "tokens.bin").write_bytes(np.concatenate(ids).astype("<u2").tobytes())
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, ids)]))
    np.save(folder / "num_bytes.npy", np.array([len(text) for text in texts]))
    np.save(folder / "hashes.npy", np.arange(len(texts), dtype=np.uint64))
    vocabulary_size = tokenizer.get_vocab_size()
    files.write_json(folder / "tokens.json", {"vocabulary_size": vocabulary_size, "start_id": 0, "end_id": 0})
    return vocabulary_size


def write_model(folder: Path, tokenizer: Path, vocabulary_size: int, seed: int) -> None:
    """A random GPT-2 of one layer, written without torch: importing that takes longer than most tests."""
    size = 16
    random = np.random.default_rng(seed)
    shapes = {
        "wte.weight": (vocabulary_size, size),
        "wpe.weight": (POSITIONS, size),
        "h.0.attn.c_attn.weight": (size, 3 * size),
        "h.0.attn.c_attn.bias": (3 * size,),
        "h.0.attn.c_proj.weight": (size, size),
        "h.0.attn.c_proj.bias": (size,),
        "h.0.mlp.c_fc.weight": (size, 4 * size),
        "h.0.mlp.c_fc.bias": (4 * size,),
        "h.0.mlp.c_proj.weight": (4 * size, size),
        "h.0.mlp.c_proj.bias": (size,),
    }
    tensors = {f"transformer.{name}": random.normal(0, 0.02, shape) for name, shape in shapes.items()}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        tensors |= {f"transformer.{name}.weight": np.ones(size), f"transformer.{name}.bias": np.zeros(size)}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocabulary_size}
    config |= {"n_positions": POSITIONS, "n_embd": size, "n_layer": 1, "n_head": 2}
    files.write_json(folder / "config.json", config | {"bos_token_id": 0, "eos_token_id": 0})
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    training = {"fingerprint": FINGERPRINT, "step": BEST_STEP, "num_steps": NUM_STEPS, "validation_loss": 5.5}
    files.write_json(folder / "training.json", training)


def paths() -> dict[str, Path]:
    return stage.paths_of(stage.read_stages()["publish"])


def publish_here() -> None:
    """Run the stage in this process; the current folder is the repository."""
    publish.main(paths(), **stage.load_params())


@contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """Change a text file for a while."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        yield
    finally:
        path.write_text(text)
