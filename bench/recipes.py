"""Tiny runs of this pipeline whose verdict is known beforehand, because they were made to get it.

Each recipe is the parameters and the text of one run. Labels are what the run was made for, never what the rules say
of it: `verdicts` must hold, those of `may` can hold as well, all others must not.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline import demo

Sections = dict[str, dict[str, Any]]  # parameters that differ from params.yaml, by section
Side = Callable[[str], str]  # of the split on which a text will be

NOISE = string.ascii_letters + string.digits + string.punctuation
TINY: Sections = {
    "ingest": {"source": "files"},
    "clean": {"min_documents": 1},
    "tokenize": {"vocabulary_size": 512},
    "split": {"validation_fraction": 0.15, "test_fraction": 0.1, "min_documents": 1},
    "train": {
        "scratch": {"num_layers": 2, "num_heads": 2, "embedding_size": 64},
        "max_length": 96,
        "batch_size": 4,
        "num_epochs": 3,
        "learning_rate": 3e-3,
        "mixed_precision": "none",
        "evaluation_interval_steps": 50,
        "evaluation_documents": 60,
        "early_stopping_patience": 0,
        "checkpoint_interval_steps": 10_000,
        "device": "cpu",
    },
    "evaluate": {"bootstrap_samples": 500},
    "sample": {"samples_per_prompt": 1},
}


@dataclass(frozen=True)
class Recipe:
    """One run. `text` makes its documents; `before`: parameters of a training whose best model it starts from."""

    name: str
    verdicts: frozenset[str]
    may: frozenset[str]
    text: Callable[[Side], list[str]]
    params: Sections = field(default_factory=dict)
    before: Sections | None = None


def merged(*layers: Sections) -> Sections:
    """The sections of all layers, the last one winning key by key."""
    found: Sections = {}
    for layer in layers:
        for section, keys in layer.items():
            found[section] = found.get(section, {}) | keys
    return found


# --- text ----------------------------------------------------------------------------------------------------------


def stories(number: int, first: int = 0) -> Callable[[Side], list[str]]:
    """Documents of the demo corpus."""
    return lambda side: [demo.document(index) for index in range(first, first + number)]


def with_damage(number: int, length: int, seed: int) -> Callable[[Side], list[str]]:
    """Stories, and among the training documents one long one that is no language."""

    def text(side: Side) -> list[str]:
        rng = random.Random(seed)
        while side(damaged := noise(rng, length)) != "train":
            pass
        return [*stories(number)(side), damaged]

    return text


def noise(rng: random.Random, length: int) -> str:
    """Characters without any order."""
    return "".join(rng.choices(NOISE, k=length))


def formula(rng: random.Random, num_numbers: int = 10) -> str:
    """A line that is easy once its kind is known; the more numbers there are, the less alike are two of them."""
    row = [rng.randrange(num_numbers) for _ in range(12)]
    return f"Row {row[0]}{row[1]}: " + " ".join(f"one and {digit} is one and {digit}," for digit in row)


def as_many_as(wanted: dict[str, int], side: Side, document: Callable[[], str]) -> list[str]:
    """Documents until each side of the split has as many as wanted."""
    found = []
    while any(wanted.values()):
        if wanted[where := side(made := document())]:
            wanted[where] -= 1
            found.append(made)
    return found


def formulas(number: int, seed: int) -> Callable[[Side], list[str]]:
    """Documents of one simple kind: what can be learned of it is soon learned, and hundreds of them are enough."""
    return lambda side: [formula(random.Random(f"{seed} {index}"), 100) for index in range(number)]


def noise_alone(number: int, seed: int) -> Callable[[Side], list[str]]:
    """Documents from which nothing can be learned but which characters there are."""
    return lambda side: [noise(rng, 200) for rng in (random.Random(f"{seed} {index}") for index in range(number))]


def with_copies(number: int, share: float, seed: int) -> Callable[[Side], list[str]]:
    """Stories, and of a share of them a copy with one word changed, on whichever side that falls."""

    def text(side: Side) -> list[str]:
        rng, originals = random.Random(seed), stories(number)(side)
        copies = []
        for original in originals[: int(share * number)]:
            words = original.split(" ")
            words[rng.randrange(len(words))] = rng.choice(words)
            copies.append(" ".join(words))
        return originals + copies

    return text


def with_easy_validation(number: int, seed: int) -> Callable[[Side], list[str]]:
    """Stories to train on; held out are formulas that training has too, for every few stories one."""

    def text(side: Side) -> list[str]:
        rng = random.Random(seed)
        kept = [story for story in stories(number)(side) if side(story) == "train"]
        wanted = {"train": number // 4, "validation": number // 6, "test": number // 8}
        return kept + as_many_as(wanted, side, lambda: formula(rng))

    return text


def of_two_kinds(number: int, seed: int) -> Callable[[Side], list[str]]:
    """Formulas and noise, whose losses lie far apart; three of each to validate on."""

    def text(side: Side) -> list[str]:
        rng, wanted = random.Random(seed), {"train": number, "validation": 3, "test": number // 5}
        easy = as_many_as(dict(wanted), side, lambda: formula(rng, 100))
        return easy + as_many_as(dict(wanted), side, lambda: noise(rng, 150))

    return text


def with_boilerplate(first: int, number: int) -> Callable[[Side], list[str]]:
    """Stories that all begin with the same long passage."""
    passage = f"{demo.document(first)} {demo.document(first + 1)}"
    return lambda side: [f"{passage} {story}" for story in stories(number)(side)]


# --- recipes -------------------------------------------------------------------------------------------------------


def recipes() -> Iterator[Recipe]:
    """All of them; several of a kind differ in size, rate, seed and text."""
    for kind in (healthy, still_improving, plateau, underfitting, overfitting, diverging, loss_spike, non_finite,
                 leakage_suspected, validation_too_small, memorising):  # fmt: skip
        yield from kind()


def recipe(
    number: int,
    verdicts: str,
    may: str,
    text: Callable[[Side], list[str]],
    before: Sections | None = None,
    **params: Any,
) -> Recipe:
    """A recipe named after its first verdict; `train__num_epochs=3` is train.num_epochs."""
    sections: Sections = {"train": {"seed": number + 1}}
    for key, value in params.items():
        section, _, name = key.partition("__")
        sections = merged(sections, {section: {name: value}})
    labels = verdicts.split()
    return Recipe(f"{labels[0]}-{number}", frozenset(labels), frozenset(may.split()), text, sections, before)


def shape(num_layers: int, embedding_size: int) -> dict[str, int]:
    """Of a model with two heads."""
    return {"num_layers": num_layers, "num_heads": 2, "embedding_size": embedding_size}


def healthy() -> Iterator[Recipe]:
    """Enough text for the model, and time for the rate to fall."""
    for number in range(9):
        yield recipe(
            number, "healthy", "", formulas(400, number), train__num_epochs=4,
            train__scratch=shape(1, (32, 28, 24)[number % 3]), train__learning_rate=(3e-3, 2.5e-3)[number % 2],
            train__evaluation_interval_steps=20,
        )  # fmt: skip


def still_improving() -> Iterator[Recipe]:
    """Training ends while the loss falls."""
    for number in range(9):
        yield recipe(
            number, "still_improving", "", stories(500 + 30 * number, 1000 * number),
            train__num_epochs=1 + number % 2, train__learning_rate=(2e-3, 3e-3, 1e-3)[number % 3],
            train__schedule=("linear", "cosine")[number % 2], train__evaluation_interval_steps=20,
        )  # fmt: skip


def plateau() -> Iterator[Recipe]:
    """A model that has learned what it can, trained on."""
    for number in range(6):  # fine-tuning at a rate that changes nothing
        yield recipe(
            number, "plateau", "", stories(500, 1000 * number), before={"train": {"num_epochs": 2 + number % 2}},
            train__learning_rate=(2e-6, 5e-6, 1e-6, 3e-6, 4e-6, 5e-7)[number], train__num_epochs=1,
            train__evaluation_interval_steps=20,
        )  # fmt: skip
    for number in range(6, 9):  # too small to learn more
        yield recipe(
            number, "plateau", "underfitting", stories(350, 1000 * number), train__scratch=shape(1, 2),
            train__num_epochs=16, train__learning_rate=(5e-2, 4e-2)[number % 2], train__evaluation_interval_steps=100,
        )  # fmt: skip


def underfitting() -> Iterator[Recipe]:
    """A rate or a training so small, or a text so void, that hardly anything is learned."""
    for number in range(4):
        yield recipe(
            number, "underfitting", "plateau still_improving", stories(500, 1000 * number),
            train__learning_rate=(1e-6, 5e-6, 2e-5, 3e-5)[number], train__num_epochs=1,
        )  # fmt: skip
    for number in range(4, 6):
        yield recipe(
            number, "underfitting", "still_improving", stories(300, 1000 * number), train__num_epochs=1,
            train__learning_rate=3e-4, train__batch_size=32, train__evaluation_interval_steps=2,
        )  # fmt: skip
    for number in range(6, 9):
        yield recipe(
            number, "underfitting", "plateau still_improving", noise_alone(400, number),
            tokenize__vocabulary_size=257, train__num_epochs=2,
        )  # fmt: skip


def overfitting() -> Iterator[Recipe]:
    """Little text, read again and again by a model that can hold it."""
    for number in range(10):
        yield recipe(
            number, "overfitting", "memorising plateau", stories(280 + 10 * number, 1000 * number),
            split__validation_fraction=0.68, train__scratch=shape(2, (112, 128)[number % 2]),
            train__num_epochs=(28, 32, 36)[number % 3], train__evaluation_interval_steps=0,
            train__learning_rate=3e-3,
        )  # fmt: skip


def diverging() -> Iterator[Recipe]:
    """A trained model, trained on at a rate far too high."""
    for number in range(9):
        yield recipe(
            number, "diverging", "underfitting plateau loss_spike validation_too_small", stories(400, 1000 * number),
            before={}, train__learning_rate=(0.1, 0.2, 0.15, 0.3, 0.25, 0.4, 0.12, 0.18, 0.5)[number],
            train__num_epochs=1, train__schedule=("linear", "cosine")[number % 2], train__warmup_ratio=0.0,
            train__max_grad_norm=(1e6, 1.0)[number % 2], train__evaluation_interval_steps=15,
        )  # fmt: skip


def loss_spike() -> Iterator[Recipe]:
    """A long damaged document among the training text."""
    for number in range(10):
        yield recipe(
            number, "loss_spike", "still_improving plateau", with_damage(500, 5_000 + 1_000 * number, number),
            train__num_epochs=3 + number % 2, train__learning_rate=(3e-3, 2e-3)[number % 2],
        )  # fmt: skip


def non_finite() -> Iterator[Recipe]:
    """An optimizer that divides by almost nothing."""
    for number in range(8):
        yield recipe(
            number, "non_finite", "", stories(300, 1000 * number), train__adam_beta2=0.0,
            train__adam_epsilon=10.0 ** -(25 + number), train__learning_rate=(1e-2, 1e-3)[number % 2],
            train__non_finite=("stop", "skip", "roll_back")[number % 3],
        )  # fmt: skip


def leakage_suspected() -> Iterator[Recipe]:
    """Held-out documents with a twin among the training text, or of a far easier kind."""
    others = "still_improving plateau overfitting memorising"
    for number in range(5):
        yield recipe(
            number, "leakage_suspected", others, with_copies(400, (0.2, 1.0, 0.5, 0.3, 0.7)[number], number),
            clean__near_duplicate_similarity=1.0, train__num_epochs=2,
        )  # fmt: skip
    for number in range(5, 9):
        yield recipe(
            number, "leakage_suspected", others, with_easy_validation(500, number),
            clean__near_duplicate_similarity=1.0, train__num_epochs=2 + number % 2,
        )  # fmt: skip


def validation_too_small() -> Iterator[Recipe]:
    """A handful of validation documents that differ much."""
    for number in range(9):
        yield recipe(
            number, "validation_too_small", "still_improving plateau overfitting", of_two_kinds(200, number),
            split__validation_fraction=0.012 + 0.0005 * number, train__num_epochs=4 + number % 2,
        )  # fmt: skip


def memorising() -> Iterator[Recipe]:
    """A passage with which every document begins."""
    for number in range(9):
        first = 90_000 + 2 * number
        yield recipe(
            number, "memorising", "leakage_suspected still_improving plateau",
            with_boilerplate(first, 260 + 10 * number), clean__near_duplicate_similarity=1.0,
            train__num_epochs=8,
            sample__prompts=[demo.document(first)[:length] for length in (40, 80, 120, 160)],
        )  # fmt: skip
