"""How often the verdicts are right: precision and recall on the recorded and on 200 synthetic curves.

    python -m bench.verdicts            # the tables, and every curve that was judged wrongly
    python -m bench.verdicts --write    # the tables into docs/verdicts.md

Of a verdict counts how often it was given where a label says so (recall), and how often a label says so where it was
given (precision). A label can leave it open; then it counts as neither. The curves whose names have a hash divisible
by three are held back: thresholds were chosen without them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import curves, synthetic
from pipeline import diagnose, rules, stage
from pipeline.thresholds import Thresholds

PAGE = Path(__file__).parent.parent / "docs" / "verdicts.md"
BEGIN, END = "<!-- made by `python -m bench.verdicts --write` -->", "<!-- end -->"
NUM_SYNTHETIC = 200
VERDICTS = [rule.verdict for rule in (*rules.RULES, rules.HEALTHY)]


@dataclass
class Score:
    """Of one verdict on some curves."""

    right: list[str] = field(default_factory=list)  # names of curves
    wrong: list[str] = field(default_factory=list)  # given, but must not be
    missed: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        return len(self.right) / max(1, len(self.right) + len(self.wrong))

    @property
    def recall(self) -> float:
        return len(self.right) / max(1, len(self.right) + len(self.missed))

    @property
    def cells(self) -> list[str]:
        """Number of curves that must have it, precision, recall."""
        number = len(self.right) + len(self.missed)
        return [str(number), f"{self.precision:.2f}", f"{self.recall:.2f}"] if number else ["0", "", ""]


def recorded() -> dict[str, dict[str, Any]]:
    """The content of every file of tests/curves, by name."""
    found = sorted(curves.CURVES.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in found}


def held_back(name: str) -> bool:
    """Whether thresholds must not be chosen by this curve."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3 == 0


def findings(curve: Mapping[str, Any], limits: Thresholds) -> dict[str, float]:
    """The verdicts that the pipeline gave, with their confidence; a refusal names one, in its pointer to the guide."""
    if curve["refused"]:
        named = re.findall(r"docs/guide\.md#(\w+)", curve["refused"])
        return dict.fromkeys(named, 1.0)
    rows = curves.rows_of(curve)
    found = diagnose.judge(rows, curve["evaluation"], curve["leakage"], curve["samples"], limits)
    return {finding["verdict"]: finding["confidence"] for finding in found["findings"]}


def scored(cases: Mapping[str, Mapping[str, Any]], found: Mapping[str, Iterable[str]]) -> dict[str, Score]:
    """The score of every verdict, from labelled curves and what was found in them."""
    scores = {verdict: Score() for verdict in VERDICTS}
    for name, curve in cases.items():
        for verdict, score in scores.items():
            if verdict in curve["verdicts"]:
                (score.right if verdict in found[name] else score.missed).append(name)
            elif verdict in found[name] and verdict not in curve["may"]:
                score.wrong.append(name)
    return scores


def table(kinds: Mapping[str, Mapping[str, Score]]) -> str:
    """Markdown: a line a verdict, three columns a kind of curves."""
    heads = [f"{kind}: {column}" for kind in kinds for column in ("curves", "precision", "recall")]
    lines = [["verdict", *heads], ["---"] * (1 + len(heads))]
    lines += [[verdict, *(cell for scores in kinds.values() for cell in scores[verdict].cells)] for verdict in VERDICTS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_confidence(cases: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence: how often what is said with much confidence is right, and the rest."""
    sure, unsure = [], []
    for name, curve in cases.items():
        for verdict, confidence in found[name].items():
            right = verdict in curve["verdicts"] or verdict in curve["may"]
            (sure if confidence > 0.9 else unsure).append(right)
    return (
        f"Of the {len(sure)} verdicts with a confidence above 0.9, {sum(sure) / max(1, len(sure)):.1%} are in the "
        f"label; of the other {len(unsure)}, {sum(unsure) / max(1, len(unsure)):.1%}."
    )


def main() -> None:
    """Judge every curve; print or write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.verdicts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/verdicts.md")
    arguments = parser.parse_args()
    limits = stage.load_params()["evaluate"].thresholds
    # Names of their own: a recorded curve may be called like one that was drawn.
    real, drawn = recorded(), {f"drawn {name}": curve for name, curve in synthetic.curves(NUM_SYNTHETIC)}
    found = {name: findings(curve, limits) for name, curve in (real | drawn).items()}
    kinds = {
        "recorded": scored(real, found),
        "held back": scored({name: curve for name, curve in real.items() if held_back(name)}, found),
        "synthetic": scored(drawn, found),
    }
    text = f"{table(kinds)}\n\n{by_confidence(real | drawn, found)}"
    print(text)
    for verdict in VERDICTS:
        for kind in ("recorded", "synthetic"):
            score = kinds[kind][verdict]
            for what, names in (("wrongly", score.wrong), ("not", score.missed)):
                if names:
                    print(f"{kind}: {verdict} {what} given: {', '.join(names)}")
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
