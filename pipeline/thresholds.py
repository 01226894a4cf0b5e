"""The thresholds of the verdicts: the one place where it is decided how much is much."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline import stage

# What rules compare a fact with; the others say what the facts are taken from.
COMPARED = (
    "flat_change", "rise", "overfitting_gap", "underfitting_margin", "leakage_margin", "leaked_share",
    "memorised_share", "widest_interval", "spike",
)  # fmt: skip


class Thresholds(stage.Params):
    """Section `evaluate.thresholds` of params.yaml; nats where its comment says so."""

    recent_share: float = Field(gt=0, lt=1)
    plateau_share: float = Field(gt=0, lt=1)
    flat_change: float = Field(ge=0)
    rise: float = Field(ge=0)
    overfitting_gap: float = Field(ge=0)
    underfitting_margin: float = Field(ge=0)
    leakage_margin: float = Field(ge=0)
    leaked_share: float = Field(ge=0, lt=1)
    memorised_share: float = Field(ge=0, lt=1)
    widest_interval: float = Field(gt=0)
    spike: float = Field(ge=0)
    spike_scatter: float = Field(ge=0)
    spike_steps: int = Field(ge=1)
    spike_blocks: int = Field(ge=3)

    @model_validator(mode="after")
    def _plateau_is_longer(self) -> Thresholds:
        if self.plateau_share < self.recent_share:
            raise ValueError(
                f"plateau_share {self.plateau_share} is below recent_share {self.recent_share}: one loss could then be "
                "still improving and on a plateau"
            )
        return self

    def times(self, factor: float) -> Thresholds:
        """The same, with all that rules compare a fact with multiplied."""
        return self.model_copy(update={name: factor * getattr(self, name) for name in COMPARED})
