"""From the numbers of a run to a verdict: is this curve normal, and what to do now?

A pure function of the rows of train.jsonl, of the content of evaluation.json and leakage.json, of the samples, and of
the thresholds in params.yaml. `pipeline/facts.py` gathers the numbers, `pipeline/rules.py` says which verdicts hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.facts import Facts, Row, of_rows, table_of, with_measurements
from pipeline.rules import Rule, held
from pipeline.thresholds import Thresholds

# What the thresholds are multiplied with to see how firmly a verdict holds: from half to double.
FACTORS = (2.0 ** np.linspace(-1, 1, 21)).tolist()


def judge(
    rows: Sequence[Row],
    evaluation: Mapping[str, Any],
    leakage: Mapping[str, Any],
    samples: Sequence[Row],
    thresholds: Thresholds,
) -> dict[str, Any]:
    """The content of diagnostics.json.

    Returns:
        `verdicts`: the names of all that hold, the primary one first; `findings`: for each, `verdict`, `because` (a
        sentence with its numbers), `confidence`, `advice` (sentences) and `guide` (where to read on); the same keys for
        the primary one alone; `evidence`: all Facts, None for what is not there.
    """
    facts = with_measurements(of_rows(table_of(rows), thresholds), evaluation, leakage, samples)
    findings = [
        {
            "verdict": rule.verdict,
            "because": rule.because.format(**asdict(facts)),
            "confidence": confidence(rule, facts, thresholds),
            "advice": list(rule.advice),
            "guide": f"docs/guide.md#{rule.verdict}",
        }
        for rule in held(facts, thresholds)
    ]
    return findings[0] | {
        "verdicts": [finding["verdict"] for finding in findings],
        "findings": findings,
        "evidence": {key: _shown(value) for key, value in asdict(facts).items()},
    }


def confidence(rule: Rule, facts: Facts, thresholds: Thresholds) -> float:
    """How far a verdict is from the edge: the share of other thresholds under which it holds as well.

    The others are those of params.yaml times a factor from half to double, the same for all of them. 1: whoever thinks
    that half or twice as much is much would say the same; about 0.5: just over the threshold, or just under it. It is
    no probability, and says nothing about chance: intervals do.
    """
    return sum(rule in held(facts, thresholds.times(factor)) for factor in FACTORS) / len(FACTORS)


class Watch:
    """Names the verdicts on a training in progress, from the rows in its file so far."""

    def __init__(self, rows_file: Path, thresholds: Thresholds) -> None:
        self.rows_file, self.thresholds = rows_file, thresholds
        self._num_bytes_read = 0
        self._table = table_of([])

    def look(self) -> tuple[Facts | None, list[str]]:
        """What the rows say so far, and the names of all verdicts that hold.

        Nothing before there are two evaluations to compare, and of a file that somebody else is changing, which is for
        the trainer to refuse.
        """
        try:
            with self.rows_file.open("rb") as file:
                file.seek(self._num_bytes_read)
                new = table_of(json.loads(line) for line in file)
                self._num_bytes_read = file.tell()
        except (OSError, ValueError, LookupError, TypeError):
            return None, []
        self._table = np.concatenate([self._table, new])
        facts = of_rows(self._table, self.thresholds)
        if facts.num_evaluations < 2:
            return None, []
        return facts, [rule.verdict for rule in held(facts, self.thresholds)]


def _shown(value: float | str) -> float | str | None:
    return value if isinstance(value, str) or math.isfinite(value) else None
