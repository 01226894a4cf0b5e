"""gate: may a model become the champion? Each check is a function of what the model's run recorded.

A check gives one finding: whether it agrees, and one sentence with the numbers. All have to agree; what they say is
kept in MLflow either way. `pipeline/promote.py` gathers what they look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from pipeline import rules, stage

if TYPE_CHECKING:
    from pipeline.significance import Comparison

NUM_DIFFERENCES_SHOWN = 3


class Limits(stage.Params):
    """Section `publish.gate` of params.yaml."""

    refused_verdicts: list[str]
    max_near_duplicates: float = Field(ge=0, le=1)
    max_ngram_tokens: float = Field(ge=0, le=1)
    max_loss_difference: float = Field(ge=0)

    @field_validator("refused_verdicts")
    @classmethod
    def _are_verdicts(cls, verdicts: list[str]) -> list[str]:
        known = [rule.verdict for rule in rules.RULES]
        unknown = [verdict for verdict in verdicts if verdict not in known]
        if unknown:
            raise ValueError(f"no verdict is called {unknown[0]}; there are {', '.join(known)}")
        return verdicts


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    agrees: bool
    sentence: str


def beats_baselines(evaluation: Mapping[str, Any]) -> Finding:
    """The first champion has no other to be better than: its test loss has to be below that of untrained models.

    The weights that training started from, and a model that only counts tokens. `last` is the same model, later on.
    """
    loss, beside = evaluation["test"]["loss"], evaluation["baselines"]["test"]
    known = {name: beside[name] for name in ("unigram", "initial") if beside[name] is not None}
    listing = ", ".join(f"{name} {other:.4f}" for name, other in known.items())
    if loss is None:
        return Finding(False, "Its test loss is not finite.")
    if all(loss < other for other in known.values()):
        return Finding(True, f"The first champion: its test loss {loss:.4f} is below the baselines ({listing}).")
    return Finding(False, f"Its test loss {loss:.4f} is not below all baselines ({listing}).")


def improves(comparison: Comparison, champion: str) -> Finding:
    """A paired comparison on the test documents of both; a difference that may be chance is none."""
    numbers = (
        f"{comparison.difference:+.4f} {comparison.unit} on {comparison.num_documents:,} test documents "
        f"(95 % interval {comparison.low:+.4f} to {comparison.high:+.4f})"
    )
    how = {"better": "Better than", "worse": "Worse than", "equal": "Not better than"}[comparison.verdict]
    chance = ", which may be chance" if comparison.verdict == "equal" else ""
    return Finding(comparison.verdict == "better", f"{how} champion version {champion}: {numbers}{chance}.")


def is_clean(leakage: Mapping[str, Any], limits: Limits) -> Finding:
    """Held-out text that is also training text makes every loss above look better than it is."""
    agrees, parts = True, []
    for side in ("validation", "test"):
        found = leakage[side]
        near = found["near_duplicate_documents"] / max(1, found["num_documents"])
        covered = found["ngram_tokens"] / max(1, found["num_tokens"])
        agrees = agrees and near <= limits.max_near_duplicates and covered <= limits.max_ngram_tokens
        parts.append(
            f"{near:.2%} of the {side} documents are near-duplicates of training documents, "
            f"and {covered:.2%} of its tokens are in {leakage['ngram_size']}-grams of theirs"
        )
    allowed = f"{limits.max_near_duplicates:.2%} and {limits.max_ngram_tokens:.2%} are allowed"
    return Finding(agrees, f"{'No leakage' if agrees else 'Leakage'}: {'; '.join(parts)} ({allowed}).")


def is_sound(diagnosis: Mapping[str, Any], limits: Limits) -> Finding:
    """None of the verdicts that hold, the primary one or another, is refused."""
    refused = [verdict for verdict in diagnosis["verdicts"] if verdict in limits.refused_verdicts]
    if refused:
        return Finding(False, f"The verdict {' and '.join(refused)} is refused (publish.gate.refused_verdicts).")
    return Finding(True, f"No refused verdict: {', '.join(diagnosis['verdicts'])}.")


def is_whole(differences: Sequence[object], num_files: int) -> Finding:
    """What MLflow holds is, byte for byte, what was published."""
    if differences:
        more = ", ..." if len(differences) > NUM_DIFFERENCES_SHOWN else ""
        shown = ", ".join(map(str, differences[:NUM_DIFFERENCES_SHOWN])) + more
        return Finding(False, f"Verification failed: {shown}.")
    return Finding(True, f"Verified: the {num_files} files in MLflow are those that were published.")


def is_reproduced(recorded: float | None, measured: float, limits: Limits) -> Finding:
    """The model, loaded from the registry, has the test loss that was recorded."""
    if recorded is not None and abs(measured - recorded) <= limits.max_loss_difference:
        return Finding(True, f"Loaded back from the registry, its test loss is {measured:.4f}, as recorded.")
    shown = "no finite number" if recorded is None else f"{recorded:.4f}"
    now = f"{measured:.4f}" if math.isfinite(measured) else "not finite"
    return Finding(False, f"Loaded back from the registry, its test loss is {now}, but {shown} was recorded.")
