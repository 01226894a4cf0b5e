"""The whole pipeline on real input, in a work tree of its own: .examples/NAME. The demo's results stay where they are.

    python -m examples.run real-text     # a small model from scratch on the reference manual of Python
    python -m examples.run pretrained    # SmolLM2-135M fine-tuned on the same text

A second run only does what is stale. `cd .examples/NAME` and everything of the README works there.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from examples import fetch_pretrained, real_text
from pipeline import files, stage
from pipeline.page import one_line

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["A class definition", "The value of the expression", "When an exception is raised,"]
# What differs from params.yaml. The text is small: 1,900 paragraphs, 90 thousand tokens.
CHANGES: dict[str, dict[str, Any]] = {
    "real-text": {
        "ingest.source": "files",
        "tokenize.vocabulary_size": 2048,
        "split.validation_fraction": 0.1,
        "split.test_fraction": 0.1,
        "train.batch_size": 8,
        "train.num_epochs": 16,
        "sample.prompts": PROMPTS,
        "publish.experiment": "real-text",
        "publish.registered_model": "real-text",
    },
    "pretrained": {
        "ingest.source": "files",
        "split.validation_fraction": 0.1,
        "split.test_fraction": 0.1,
        "train.max_length": 256,
        "train.batch_size": 8,
        "train.num_epochs": 1,
        "train.learning_rate": 5e-5,
        "train.evaluation_batch_size": 16,
        "evaluate.batch_size": 16,
        "sample.prompts": PROMPTS,
        "publish.experiment": "pretrained",
        "publish.registered_model": "pretrained",
    },
}


def main() -> None:
    """Run one of the examples and print what it gave."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CHANGES)
    name = parser.parse_args().name
    with stage.refusals(name):
        folder, changes = ROOT / ".examples" / name, CHANGES[name]
        if name == "pretrained":
            base = ROOT / fetch_pretrained.FOLDER
            changes = changes | {
                "model.base": os.path.relpath(base, folder),
                "model.revision": fetch_pretrained.fetch(base),
            }
        make(folder, changes)
        print("\n".join(figures(folder)), flush=True)
        if name == "pretrained":
            print("\n".join(comparison(folder, base)), flush=True)
        python(folder, "-m", "pipeline.summary")
        print(f"{'folder':10}  {os.path.relpath(folder)}")


def make(folder: Path, changes: Mapping[str, Any], num_paragraphs: int | None = None) -> None:
    """Run the pipeline in the folder, with these parameters, on the first paragraphs of the real text or on all."""
    prepare(folder)
    real_text.write(folder / real_text.FILE, num_paragraphs)
    change(folder / "params.yaml", changes)
    python(folder, "-m", "dvc", "repro")


def prepare(folder: Path) -> None:
    """Make the folder a work tree at the present commit with the present files; what earlier runs left there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet")
    git(folder, "fetch", "--quiet", "--depth", "1", str(ROOT), "HEAD")
    git(folder, "reset", "--quiet", "FETCH_HEAD")
    present = listed(ROOT)
    for file in listed(folder) - present:
        (folder / file).unlink(missing_ok=True)
    for file in present:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)


def listed(folder: Path) -> set[str]:
    """Files that git tracks or would track, save dvc.lock: its state belongs to the tree it lies in."""
    names = git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return {name for name in names if name and name != "dvc.lock" and (folder / name).is_file()}


def git(folder: Path, *arguments: str) -> str:
    """Run git in the folder."""
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout


def change(file: Path, values: Mapping[str, Any]) -> None:
    """Set keys of a params.yaml, named as DVC names them; comments stay."""
    yaml = YAML()
    params = yaml.load(file)
    for name, value in values.items():
        section, key = name.split(".")
        assert key in params[section], f"{file} has no {name}"
        params[section][key] = value
    with files.whole_file(file) as beside:
        yaml.dump(params, beside)


def python(folder: Path, *arguments: str) -> None:
    """Run this Python in the folder, which stages find on their PATH too.

    Raises:
        Refusal: it failed; what it had to say has been printed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=os.environ | {"PATH": path})
    if done.returncode:
        raise stage.Refusal(f"`python {' '.join(arguments)}` in {folder} failed with exit code {done.returncode}")


def figures(folder: Path) -> list[str]:
    """What cleaning, tokenizing and splitting made of the text, a line each."""
    clean, tokens, sides = (
        files.read_json(folder / "reports" / f"{name}.json") for name in ("clean", "tokenize", "split")
    )
    dropped = {reason: number for reason, number in clean["documents_dropped"].items() if number}
    return [
        f"{'documents':10}  {clean['documents_kept']:,} kept of {clean['documents_in']:,}; dropped: "
        + ", ".join(f"{number:,} {reason}" for reason, number in dropped.items()),
        f"{'tokens':10}  {tokens['num_tokens']:,}, {tokens['bytes_per_token']:.2f} bytes each; "
        + ", ".join(f"{side} {size['tokens']:,} in {size['documents']:,} documents" for side, size in sides.items()),
    ]


def comparison(folder: Path, base: Path) -> list[str]:
    """Test perplexity and samples of the base model and of what fine-tuning made of it, a line each."""
    from pipeline import corpus, generate, sample

    evaluation = files.read_json(folder / "reports" / "evaluation.json")
    before, after = math.exp(evaluation["baselines"]["test"]["initial"]), evaluation["test"]["perplexity"]
    params = sample.Params.model_validate(YAML(typ="safe").load(folder / "params.yaml")["sample"])
    model, tokenizer = generate.load(base)
    train_documents = np.load(folder / "data" / "split" / "train.npy", allow_pickle=False)
    tokens = corpus.load(folder / "data" / "tokens")
    of_base = sample.samples(model, tokenizer, tokens, train_documents, params)
    of_best = files.read_jsonl(folder / "reports" / "samples.jsonl")
    return [
        f"{'perplexity':10}  test {before:.2f} before, {after:.2f} after fine-tuning",
        *(
            f"{when:10}  ({row['method']}) {one_line(row['text'], 240)}"
            for pair in zip(of_base, of_best, strict=True)
            for when, row in zip(("before", "after"), pair, strict=True)
        ),
    ]


if __name__ == "__main__":
    main()
