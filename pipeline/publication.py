"""What is published: the content of publication.json, a function of the files of the pipeline and of params.yaml."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import corpus, files, stage

SIDES = ("train", "validation", "test")
NO_REPORTS = {"best", "tokens", "split", "publication.json"}


def content(paths: stage.Paths, params: Mapping[str, Any]) -> dict[str, Any]:
    """What is published: the content of publication.json, a function of the files and of params.yaml."""
    training = files.read_json(paths["best"] / "training.json", "fingerprint", "step")
    evaluation = files.read_json(paths["evaluation.json"], "validation", "test")
    found = {
        "datasets": datasets(paths),
        "experiment": params["publish"]["experiment"],
        "fingerprint": training["fingerprint"],
        "losses": {side: evaluation[side]["loss"] for side in ("validation", "test")},
        "model_sha256": model_sha256(paths["best"]),
        "params": flat(params),
        "registered_model": params["publish"]["registered_model"],
        "reports": {path.as_posix(): files.sha256_of(path) for path in reports(paths)},
        "step": training["step"],
        "verdict": files.read_json(paths["diagnostics.json"], "verdict")["verdict"],
    }
    text = json.dumps(found, sort_keys=True, ensure_ascii=False)
    return {"publication": hashlib.sha256(text.encode()).hexdigest(), **found}


def reports(paths: stage.Paths) -> list[Path]:
    """Every report and picture that the stages wrote."""
    return [path for name, path in sorted(paths.items()) if name not in NO_REPORTS]


def model_sha256(folder: Path) -> str:
    """SHA-256 of what a model does: all files but training.json, which tells how it came about."""
    listing = hashlib.sha256()
    for file in (path for path in files.listing(folder) if path.name != "training.json"):
        listing.update(f"{file.relative_to(folder).as_posix()}\0{files.sha256_of(file)}\n".encode())
    return listing.hexdigest()


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """All parameters under their dotted names, as text; a list is JSON, null is the word null."""
    found: dict[str, str] = {}
    for key, value in sorted(params.items()):
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def datasets(paths: stage.Paths) -> dict[str, dict[str, Any]]:
    """Each side's documents: how many, and a digest of their texts' hashes and of the tokenizer."""
    tokens = corpus.load(paths["tokens"])
    tokenizer = files.sha256_of(paths["tokens"] / "tokenizer")
    found: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        documents = corpus.read_side(paths["split"], side, tokens.num_documents)
        digest = hashlib.sha256(tokenizer.encode() + tokens.hashes[documents].astype("<u8").tobytes()).hexdigest()
        found[side] = {
            "digest": digest[:32],  # MLflow takes 36 characters
            "num_bytes": int(tokens.num_bytes[documents].sum()),
            "num_documents": len(documents),
            "num_tokens": int(tokens.lengths[documents].sum()),
            "source": (paths["split"] / f"{side}.npy").as_posix(),
        }
    return found


def final_metrics(evaluation: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of evaluation.json by name: test_loss, test_loss_ci95_low, validation_perplexity and so on."""
    found: dict[str, float] = {}
    for key, value in evaluation.items():
        if isinstance(value, Mapping):
            found |= final_metrics(value, f"{prefix}{key}_")
        elif key.endswith("_ci95"):
            found |= final_metrics({f"{key}_low": value[0], f"{key}_high": value[1]}, prefix)
        elif isinstance(value, int | float) and math.isfinite(value):
            found[prefix + key] = float(value)
    return found
