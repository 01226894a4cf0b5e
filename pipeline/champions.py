"""Who is champion, who was, and what a person changed: the alias `champion` and its history, kept in MLflow.

The alias is the truth, and MLflow's pages let anybody move it. So the registered model has a tag with the versions that
became champion, one after the other: where the alias is not at the last of them, a person moved it. That is respected,
and recorded like every other change: as the tags `pipeline.promotion` (what happened to a version last) and
`pipeline.promotion_reasons`, and as a section of the version's description.

Written in an order that lets the next start finish what a killed one began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.stage import Refusal
from pipeline.tracking import Store


class Champions:
    """The champions of one registered model. Call under `tracking.problems`; to write, under `tracking.alone` too."""

    ALIAS = "champion"
    HISTORY = "pipeline.champions"  # tag of the registered model: numbers of versions; the last is or was the champion
    STATE, REASONS = "pipeline.promotion", "pipeline.promotion_reasons"  # tags of a version
    PROMOTED, RETURNED, CHOSEN = "promoted", "returned by rollback", "chosen by hand"  # states of a champion
    REFUSED, REPLACED, WITHDRAWN = "refused", "replaced", "withdrawn"  # of the others
    SECTION = "\n\n### Promotion\n\n"  # of a description

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.client, self.name = store, store.client, name
        if not self.client.search_registered_models(f"name = '{name}'"):
            raise Refusal(f"MLflow has no registered model {name!r} yet; run `dvc repro`")

    def holder(self, alias: str) -> str | None:
        """The number of the version with this alias."""
        aliases = self.client.get_registered_model(self.name).aliases
        return str(aliases[alias]) if alias in aliases else None

    @property
    def history(self) -> list[str]:
        """The versions that became champion, the last one last; one that was deleted since keeps its place."""
        return str(self.client.get_registered_model(self.name).tags.get(self.HISTORY, "")).split()

    def version(self, number: str) -> Any:
        """One version.

        Raises:
            Refusal: there is none of this number.
        """
        versions = self._versions()
        if number not in versions:
            known = ", ".join(sorted(versions, key=int)) or "none"
            raise Refusal(f"{self.name!r} has no version {number}; there are: {known}")
        return versions[number]

    def state(self, number: str) -> str | None:
        """What happened to a version last."""
        found = self._versions().get(number)
        return found.tags.get(self.STATE) if found else None

    def settle(self) -> None:
        """Finish what a killed promotion began, or record what a person did to the alias."""
        current, before = self.holder(self.ALIAS), self._last()
        if current is None:
            if before is not None:
                self.note(before, self.WITHDRAWN, ["A person took the alias champion away, in MLflow."])
            return
        state = self.state(current)
        if current == before and state in (self.PROMOTED, self.RETURNED, self.CHOSEN):
            return
        if state not in (self.PROMOTED, self.RETURNED):
            state = self.CHOSEN
            self.note(current, state, ["A person made it the champion, in MLflow."])
        self._hand_over(before, current, state)

    def crown(self, number: str, state: str, sentences: Sequence[str]) -> None:
        """Make a version the champion, and write down why; `settle` comes first."""
        before = self._last()
        self.note(number, state, sentences)
        self.client.set_registered_model_alias(self.name, self.ALIAS, number)
        self._hand_over(before, number, state)

    def roll_back(self) -> tuple[str | None, str]:
        """Return to the champion before, of those that still exist; the numbers of the one left and of that one.

        Raises:
            Refusal: there is none before.
        """
        left, versions = self.holder(self.ALIAS), self._versions()
        earlier = [number for number in self.history if number != left and number in versions]
        if not earlier:
            why = f"version {left} is the only one" if left else "there never was one"
            raise Refusal(f"{self.name!r} has no champion to go back to: {why}")
        place = f"version {left}" if left else "a time without champion"
        self.crown(earlier[-1], self.RETURNED, [f"Returned to from {place}, with --rollback."])
        return left, earlier[-1]

    def note(self, number: str, state: str, sentences: Sequence[str]) -> None:
        """Write down what happened to a version, unless it stands there already; a deleted one has no place for it."""
        found = self._versions().get(number)
        if found is None:
            return
        for tag, value in {self.STATE: state, self.REASONS: "\n".join(sentences)}.items():
            if found.tags.get(tag) != value:
                self.client.set_model_version_tag(self.name, number, tag, value)
        before = found.description or ""
        listed = "\n".join(f"- {sentence}" for sentence in sentences)
        description = f"{before.partition(self.SECTION)[0]}{self.SECTION}{state.capitalize()}.\n\n{listed}"
        if description != before:
            self.client.update_model_version(self.name, number, description)

    def _hand_over(self, before: str | None, number: str, state: str) -> None:
        """What remains once the alias is at its new version: a word on the one before, and the history."""
        history = self.history
        if before is not None and before != number:
            words = {
                self.PROMOTED: (self.REPLACED, f"Version {number} replaced it."),
                self.RETURNED: (self.WITHDRAWN, f"Rolled back to version {number}."),
                self.CHOSEN: (self.WITHDRAWN, f"A person made version {number} the champion, in MLflow."),
            }
            self.note(before, words[state][0], [words[state][1]])
        if state == self.RETURNED and number in history:  # the later ones are undone
            history = history[: len(history) - history[::-1].index(number)]
        elif before != number:
            history = [*history, number]
        if history != self.history:
            self.client.set_registered_model_tag(self.name, self.HISTORY, " ".join(history))

    def _last(self) -> str | None:
        return next(iter(self.history[::-1]), None)

    def _versions(self) -> dict[str, Any]:
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return {str(version.version): version for version in found}
