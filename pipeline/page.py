"""What a person reads of a run in MLflow: its name, its description in Markdown, and its samples as a table.

Functions of what the files say and of the champion that was there; `publish` gathers both, `tracking` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import markdown

NUM_NAME_CHARACTERS = 80  # of the changes in a run's name
MAX_CHARACTERS = 8000  # MLflow's limit for a tag, and the description is one
NUM_SAMPLES, NUM_SAMPLE_CHARACTERS = 3, 400
NUM_VALUE_CHARACTERS, NUM_DIGITS = 100, 8  # of a parameter, and of a digest, in the table of changes
COLUMNS = ("prompt", "continuation", "method", "longest_overlap_num_tokens", "memorised")  # of the table of samples
BASELINES = {"initial": "before training", "unigram": "word frequencies alone", "last": "the last weights"}


@dataclass(frozen=True)
class Made:
    """What a result was made of."""

    params: Mapping[str, str]  # dotted name -> text
    datasets: Mapping[str, str]  # side -> digest
    commit: str


def changes(new: Made, champion: Made | None) -> dict[str, tuple[str, str]]:
    """The parameters that differ: name -> (the champion's, this run's); of publishing they make no other result."""
    if champion is None:
        return {}
    names = [name for name in sorted({*new.params, *champion.params}) if not name.startswith("publish.")]
    both = {name: (champion.params.get(name, "not there"), new.params.get(name, "not there")) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def name(publication: str, new: Made, champion: Made | None, experiment: str | None) -> str:
    """A run's name: the DVC experiment, if it is one, what the run changed against the champion, the result's digits.

    Where no parameter changed, it is other data or other code that did, or nothing.
    """
    last_words = [key.rpartition(".")[2] for key in new.params]
    parts = []
    for key, (before, after) in changes(new, champion).items():
        short = key.rpartition(".")[2]
        parts.append(f"{short if last_words.count(short) == 1 else key} {before} -> {after}")
    if champion is None:
        parts = ["first"]
    elif not parts and new.datasets != champion.datasets:
        parts = ["other data"]
    elif not parts:
        parts = ["other code" if new.commit != champion.commit else "again"]
    num_shown = len(parts)
    while num_shown > 1 and len(", ".join(parts[:num_shown])) > NUM_NAME_CHARACTERS:
        num_shown -= 1
    shown = one_line(", ".join(parts[:num_shown]), NUM_NAME_CHARACTERS)
    more = f" and {len(parts) - num_shown} more" if num_shown < len(parts) else ""
    return f"{f'{experiment}: ' if experiment else ''}{shown}{more} | {publication[:8]}"


def description(
    run_id: str,
    evaluation: Mapping[str, Any],
    diagnosis: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    new: Made,
    champion: Made | None,
    number: str | None,
) -> str:
    """The description: the verdict and what to do next, the losses, what changed, samples, and the way back.

    Args:
        evaluation: evaluation.json.
        diagnosis: diagnostics.json.
        samples: the rows of samples.jsonl.
        number: the champion's version.
    """
    lines = []
    for finding in diagnosis["findings"]:
        lines += [f"**{markdown.escaped(finding['verdict'])}**: {markdown.escaped(finding['because'])}", ""]
        lines += [f"- {markdown.escaped(advice)}" for advice in finding["advice"]]
        lines += [f"- Read on in {markdown.escaped(finding['guide'])}.", ""]
    lines += [*markdown.table(["nats per token", "loss", "95 % interval", "perplexity"], _losses(evaluation)), ""]
    end = (
        f"Commit {new.commit}. What belongs to this run: `python -m pipeline.audit {run_id}`; "
        f"to make it again: `python -m pipeline.replay {run_id}`."
    )
    rest = []  # cut from its end, samples first, where all would be too long for MLflow
    if champion is not None and (changed := _changed(new, champion)):
        rest += [*markdown.table(["changed", f"champion (version {number})", "here"], changed), ""]
    if samples:
        rest += ["What it makes of its prompts:", ""]
    for sample in one_a_prompt(samples):
        rest += [f"> {markdown.escaped(one_line(sample['text'], NUM_SAMPLE_CHARACTERS))}", ""]
    while len(text := "\n".join([*lines, *rest, "", end])) > MAX_CHARACTERS:
        rest.pop()
    return text


def samples_table(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The samples as MLflow keeps tables."""
    return {"columns": list(COLUMNS), "data": [[sample.get(name) for name in COLUMNS] for sample in samples]}


def _changed(new: Made, champion: Made) -> list[list[str]]:
    """What differs, a row each: parameters, the data of each side, the code."""
    rows = [
        [f"`{key}`", *(markdown.escaped(one_line(value, NUM_VALUE_CHARACTERS)) for value in pair)]
        for key, pair in changes(new, champion).items()
    ]
    digests = {f"data of {side}": (champion.datasets.get(side, "none"), here) for side, here in new.datasets.items()}
    for what, (theirs, here) in {**digests, "code (commit)": (champion.commit, new.commit)}.items():
        if theirs != here:
            rows.append([what, theirs[:NUM_DIGITS], here[:NUM_DIGITS]])
    return rows


def _losses(evaluation: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [f"**{side}**", _number(one["loss"]), " to ".join(map(_number, one["loss_ci95"])), _number(one["perplexity"])]
        for side in ("validation", "test", "train")
        for one in [evaluation[side]]
    ]
    baselines = evaluation["baselines"]["validation"]
    return rows + [
        [f"validation, {about}", _number(baselines[key]), "", ""]
        for key, about in BASELINES.items()
        if key in baselines
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def one_a_prompt(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last sample of each of the first prompts: a sampled one, where there is one."""
    return list({sample["prompt"]: sample for sample in samples}.values())[:NUM_SAMPLES]


def one_line(text: str, width: int) -> str:
    """The text without its line breaks, cut to the width."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: max(1, width - 1)].rstrip() + "…"
