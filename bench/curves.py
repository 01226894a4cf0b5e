"""Record labelled curves: every recipe of bench/recipes.py as a real, tiny run of this pipeline's stages.

    python -m bench.curves                   # those that tests/curves lacks, two at a time
    python -m bench.curves overfitting-3     # these again

What a run's verdict is made of goes into tests/curves/NAME.json, to about four digits: rows, evaluation, leakage,
samples, and the labels of its recipe. A training that was refused has its message instead of what comes after it. About
a quarter of a minute a run; `python -m bench.verdicts` scores them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from bench import recipes
from bench.recipes import TINY, Recipe, Sections, merged

ROOT = Path(__file__).parent.parent
CURVES = ROOT / "tests" / "curves"
NUM_AT_ONCE = 2
STAGES = ("ingest", "clean", "tokenize", "split", "train", "sample", "evaluate")
OF_STEPS = ("step", "loss", "learning_rate", "grad_norm")
OF_EVALUATIONS = ("step", "train_eval_loss", "validation_loss", "validation_loss_ci95")
KEPT = {  # of what a verdict looks at besides the rows
    "evaluation.json": ("train", "validation", "test", "generalisation_gap", "baselines"),
    "samples.jsonl": ("memorised", "longest_overlap_num_tokens"),
}


def record(recipe: Recipe, file: Path) -> None:
    """Run the recipe in a folder of its own, and write what it gave."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        for name in ("dvc.yaml", "params.yaml", "requirements.lock"):
            shutil.copy(ROOT / name, name)
        shutil.copytree(ROOT / "pipeline", "pipeline")  # what a training's fingerprint is made of
        if recipe.before is not None:
            assert run(recipe, merged(TINY, recipe.before), STAGES[:5]) == ""
            shutil.move("models/best", "base")
        refused = run(recipe, merged(TINY, recipe.params, based_on(Path("base"))), STAGES)
        found = what_came_out(refused)
    labels = {"verdicts": sorted(recipe.verdicts), "may": sorted(recipe.may)}
    text = json.dumps(rounded(labels | found), sort_keys=True, separators=(",", ":"), allow_nan=False)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def based_on(folder: Path) -> Sections:
    """The section `model` of a run that starts from the model in the folder, if there is one."""
    from pipeline import files

    return {"model": {"base": str(folder), "revision": files.sha256_of(folder)}} if folder.exists() else {}


def run(recipe: Recipe, changes: Sections, stages: Sequence[str]) -> str:
    """Run stages here, with these parameters; returns the message of a training that was refused."""
    from pipeline import stage, train

    train.follow = lambda folder: None  # no live curves: nobody looks
    yaml, file = YAML(), ROOT / "params.yaml"
    content = yaml.load(file)
    for section, keys in changes.items():
        content[section].update(keys)
    yaml.dump(content, Path("params.yaml"))
    sections, definitions = stage.load_params(), stage.read_stages()
    Path("data/source").mkdir(parents=True, exist_ok=True)
    lines = recipe.text(side_of(sections["split"]))
    Path("data/source/text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in stages:
        wanted = {key: sections[key] for key in definitions[name]["params"]}
        try:
            importlib.import_module(f"pipeline.{name}").main(stage.paths_of(definitions[name]), **wanted)
        except stage.Refusal as problem:
            if name != "train":
                raise
            return str(problem)
    return ""


def side_of(params: Any) -> Callable[[str], str]:
    """On which side of the split a text that cleaning leaves as it is will be."""
    from pipeline import sides

    def side(text: str) -> str:
        first = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], ">u8").astype(np.uint64)
        return sides.SIDES[int(sides.side_of(first, params)[0])]

    return side


def what_came_out(refused: str) -> dict[str, Any]:
    """What the verdict is made of."""
    from pipeline import files

    left = sorted(Path(".runs").glob("*/train.jsonl"), key=lambda file: file.stat().st_mtime)
    rows = files.read_jsonl(left[-1] if refused else Path("reports/train.jsonl"))
    found: dict[str, Any] = {
        "steps": columns(rows[1:], OF_STEPS),
        "evaluations": columns([row for row in rows if "validation_loss" in row], OF_EVALUATIONS),
        "refused": refused.partition("\n")[0],
    }
    if not refused:
        evaluation = files.read_json(Path("reports/evaluation.json"))
        samples = files.read_jsonl(Path("reports/samples.jsonl"))
        found["evaluation"] = {key: evaluation[key] for key in KEPT["evaluation.json"]}
        found["samples"] = [{key: sample[key] for key in KEPT["samples.jsonl"]} for sample in samples]
        found["leakage"] = files.read_json(Path("reports/leakage.json"))
    return found


def columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Rows as columns, which take a third of the room; None where a row has no such value."""
    return {name: [row.get(name) for row in rows] for name in names}


def rows_of(recorded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows again."""
    rows: dict[int, dict[str, Any]] = {}
    for table in (recorded["evaluations"], recorded["steps"]):
        for line in zip(*table.values(), strict=True):
            row = {name: value for name, value in zip(table, line, strict=True) if value is not None}
            rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def rounded(value: Any) -> Any:
    """The value with every float in it rounded to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def main() -> None:
    """Record in processes of their own, or one here."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {recipe.name: recipe for recipe in recipes.recipes()}
    parser.add_argument("names", nargs="*", help="of recipes; by default those that are not recorded yet")
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    names = arguments.names or [name for name in known if not (CURVES / f"{name}.json").exists()]
    if arguments.here:
        from pipeline import launcher

        launcher.settle()
        for name in names:
            record(known[name], CURVES / f"{name}.json")
        return

    def one(name: str) -> None:
        command = [sys.executable, "-m", "bench.curves", "--here", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(f"{name}: {'recorded' if done.returncode == 0 else done.stderr[-2000:]}", flush=True)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(one, names))


if __name__ == "__main__":
    main()
