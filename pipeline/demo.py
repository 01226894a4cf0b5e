"""The demo corpus: short stories, letters, dialogues, descriptions, questions and how-to notes, generated here.

A genre is a text with choices, `[a|b]`, and slots, `{name}`. A document fills one genre from one scene, so that a
person, an animal or a thing stays the same from the first sentence to the last. Document i is a function of i alone:
a corpus of a thousand documents is the beginning of one of six thousand. Dirt of every usual kind is mixed in.
"""

import codecs
import random
import re
import unicodedata
from collections.abc import Iterator
from functools import cache

from pipeline import demo_plots as plots
from pipeline import demo_words as words
from pipeline.demo_genres import GENRES

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
# Bytes that get into a document: stray spaces, control characters, a byte order mark, a line separator, broken UTF-8.
STAINS = (
    b" ",
    b"\t",
    b"   ",
    "\xa0".encode(),
    b"\0",
    b"\x07",
    codecs.BOM_UTF8,
    "\u2028".encode(),
    b"\x92",
    b"\xff\xe2",
)
STAINED_PERCENT = 6
EXTRA_PERCENT = 12
LINE_ENDS = (b"\n",) * 9 + (b"\r\n",)

# Each table gives two different rows to a scene: the columns of the first are named as here, those of the second
# have a 2 behind their names.
SCENE = {
    "town": words.TOWNS,
    "place": words.PLACES,
    "spot": words.SPOTS,
    "when": words.WHEN,
    "girl": words.GIRLS,
    "kin": words.KIN,
    "dish": words.DISHES,
    "moral": words.MORALS,
    "name he him his": words.PEOPLE,
    "thing material use": words.THINGS,
    "animal animals coat food home habit": words.ANIMALS,
    "trade shop goods work tool": words.TRADES,
    "weather effect": words.WEATHER,
    "trouble broke wrong right after": plots.TROUBLES,
    "wish obstacle deed result": plots.WISHES,
    "fault act outcome lesson": plots.FABLES,
    "scene see1 see2 see3 sound smell": words.SCENES,
    "question answer": plots.QUESTIONS,
    "task needs step1 step2 step3 step4 tip": plots.HOWTOS,
}


@cache
def table(cells: str, num_columns: int) -> list[list[str]]:
    """A table of words as rows."""
    flat = re.split(r" \| |\n", cells)
    assert len(flat) % num_columns == 0, f"a row of {flat[0]!r}... lacks a column"
    return [flat[start : start + num_columns] for start in range(0, len(flat), num_columns)]


def choose(text: str, rng: random.Random) -> str:
    """Decide every choice, the innermost first."""
    while "[" in text:
        text = CHOICE.sub(lambda choice: rng.choice(choice[1].split("|")), text)
    return text


def draw_scene(rng: random.Random) -> dict[str, str]:
    """Who and what a document is about."""
    scene = {}
    for columns, cells in SCENE.items():
        names = columns.split()
        for row, suffix in zip(rng.sample(table(cells, len(names)), 2), ("", "2"), strict=True):
            scene.update({name + suffix: choose(cell, rng) for name, cell in zip(names, row, strict=True)})
    return scene


def document(index: int, attempt: int = 0) -> str:
    """One clean document."""
    rng = random.Random(f"document {index}.{attempt}")
    scene = draw_scene(rng)

    def fill(slot: re.Match[str]) -> str:
        name = slot[1]
        return scene[name] if name in scene else scene[name.lower()][:1].upper() + scene[name.lower()][1:]

    text = choose(re.sub(r"\s+", " ", rng.choice(GENRES)).replace(" |", "|"), rng)
    while "{" in text:  # a column may have slots of its own
        text = SLOT.sub(fill, text)
    return ARTICLE.sub(r"\1n ", re.sub(r" +", " ", text).strip())


def documents(num_documents: int) -> Iterator[str]:
    """That many different clean documents."""
    seen: set[str] = set()
    for index in range(num_documents):
        attempt = 0
        while (text := document(index, attempt)) in seen:
            attempt += 1
        seen.add(text)
        yield text


def extra(text: str, rng: random.Random) -> str:
    """A line that cleaning should remove: a copy, a near copy, a fragment of another document, or nothing."""
    parts = text.split(" ")
    at = rng.randrange(len(parts))
    match rng.choice(("copy", "copy", "changed", "changed", "dropped", "fragment", "blank")):
        case "copy":
            return unicodedata.normalize("NFD", text)
        case "changed":
            return " ".join([*parts[:at], rng.choice(parts), *parts[at + 1 :]])
        case "dropped":
            return "  ".join([*parts[:at], *parts[at + 1 :]])
        case "fragment":
            return text[: rng.randrange(1, 20)]
    return " " * at


def corpus(num_documents: int) -> bytes:
    """The documents a line each, and the dirt, as the bytes of a file that somebody might have."""
    clean: list[str] = []
    lines = [codecs.BOM_UTF8]
    for index, text in enumerate(documents(num_documents)):
        clean.append(text)
        rng = random.Random(f"dirt {index}")
        line = text.encode()
        if rng.randrange(100) < STAINED_PERCENT:
            head, space, tail = line.partition(b" ")
            line = head + space + rng.choice(STAINS) + tail
        lines += [line, rng.choice(LINE_ENDS)]
        if rng.randrange(100) < EXTRA_PERCENT:
            lines += [extra(rng.choice(clean), rng).encode(), rng.choice(LINE_ENDS)]
    return b"".join(lines)
