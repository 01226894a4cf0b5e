import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import markdown, page, rules
from pipeline.page import Made

PARAMS = {"train.learning_rate": "0.002", "train.seed": "1", "split.seed": "1", "publish.experiment": "x"}
SIDE = {"loss": 1.25, "loss_ci95": [1.0, 1.5], "perplexity": 3.49}
EVALUATION = {side: SIDE for side in ("validation", "test", "train")} | {
    "baselines": {"validation": {"initial": 8.0, "unigram": 6.0, "last": None}}
}
WAY_BACK = (
    "Commit c. What belongs to this run: `python -m pipeline.audit run1`; "
    "to make it again: `python -m pipeline.replay run1`."
)
FINDING = {"verdict": "still_improving", "because": "It *falls*.", "advice": ["Continue."], "guide": "docs/guide.md#x"}


def made(commit="c", data="d", **params):
    return Made(PARAMS | {key.replace("__", "."): value for key, value in params.items()}, {"train": data}, commit)


@pytest.mark.parametrize(
    ("new", "champion", "name"),
    [
        (made(), None, "first"),
        (made(), made(), "again"),
        (made(commit="e"), made(), "other code"),
        (made(data="f", commit="e"), made(), "other data"),
        (made(train__learning_rate="0.001"), made(), "learning_rate 0.002 -> 0.001"),
        (made(train__seed="2", data="f"), made(), "train.seed 1 -> 2"),  # there are two seeds
        (made(publish__experiment="y"), made(), "again"),
        (made(train__new="2"), made(), "new not there -> 2"),
    ],
)
def test_a_name_says_what_the_run_changed(new, champion, name):
    assert page.name("0123456789", new, champion, None) == f"{name} | 01234567"


def test_the_name_of_an_experiment_comes_first():
    assert page.name("0123456789", made(), made(), "bold-name") == "bold-name: again | 01234567"


def test_a_name_with_many_changes_counts_the_rest():
    many = {f"train__some_parameter_{number}": "1" for number in range(9)}
    name = page.name("0123456789", made(**many), made(), None)
    assert name == ("some_parameter_0 not there -> 1, some_parameter_1 not there -> 1 and 7 more | 01234567")
    long = page.name("0123456789", made(train__learning_rate="x" * 500), made(), None)
    assert len(long) < 100 and "…" in long


def description(samples, champion=None, new=None):
    return page.description("run1", EVALUATION, {"findings": [FINDING]}, samples, new or made(), champion, "3")


def test_a_description_has_verdict_advice_losses_and_the_way_back():
    text = description([])
    assert text.startswith("**still\\_improving**: It \\*falls\\*.\n\n- Continue.\n- Read on in docs/guide.md\\#x.")
    assert "| **validation** | 1.25 | 1 to 1.5 | 3.49 |" in text
    assert "| validation, the last weights | not finite |" in text
    assert "champion" not in text and text.endswith(WAY_BACK)


def test_what_changed_is_a_table_that_no_value_breaks():
    text = description([], made(), made(train__learning_rate="a|b<i>"))
    assert "| `train.learning_rate` | 0.002 | a\\|b&#60;i\\> |" in text and "champion (version 3)" in text


def test_other_data_and_other_code_are_in_the_table_too():
    text = description([], made(data="0123456789", commit="abcdef012345"), made(data="f"))
    assert "| data of train | 01234567 | f |\n| code (commit) | abcdef01 | c |\n" in text


def test_all_verdicts_at_once_fit():
    findings = [
        {
            "verdict": rule.verdict,
            "because": rule.because,
            "advice": rule.advice,
            "guide": f"docs/guide.md#{rule.verdict}",
        }
        for rule in (*rules.RULES, rules.HEALTHY)
    ]
    text = page.description("run1", EVALUATION, {"findings": findings}, [], made(), None, None)
    assert len(text) < page.MAX_CHARACTERS and text.endswith(WAY_BACK)


def test_no_sample_becomes_markup_and_all_fit():
    hostile = "# a\n\n> b\n<script>alert(1)</script> [x](http://y) ![z](w)" + " word" * 1000
    samples = [{"prompt": str(number), "text": hostile} for number in range(9)]
    text = description(samples)
    assert text.count("\n> ") == page.NUM_SAMPLES and len(text) <= page.MAX_CHARACTERS
    for mark in ("<script>", "[x]", "http://", "![z]"):
        assert mark not in text
    # What is too long is cut: values first, then samples, then the table of changes, never the way back.
    changed = {f"train__p{number:03}": "x" * 300 for number in range(40)}
    long = description(samples, made(), made(**changed))
    assert "train.p039" in long and len(long) <= page.MAX_CHARACTERS and long.endswith(WAY_BACK)
    longer = description(samples, made(), made(**{f"{key}{n}": value for key, value in changed.items() for n in "ab"}))
    assert "\n> " not in longer and len(longer) <= page.MAX_CHARACTERS and longer.endswith(f"\n\n{WAY_BACK}")


def test_samples_are_a_table_with_a_row_each():
    rows = [{"prompt": "a", "continuation": "b", "method": "greedy", "memorised": True, "other": 1}]
    assert page.samples_table(rows) == {"columns": list(page.COLUMNS), "data": [["a", "b", "greedy", None, True]]}


@pytest.mark.parametrize("text", ["1. x", "- x", "+ x", "# x", "`x`", "a | b", "www.x.org", "\x1b[31m"])
def test_markdown_marks_are_escaped(text):
    assert markdown.escaped(text) != text


@given(st.text())
@example("\\<img src='http://x'>& $5 @joe :+1: 1) - # [x] {y} !z |")
def test_mlflows_pages_know_every_backslash(text):
    assert set(re.findall(r"\\(.)", markdown.escaped(text))) <= set("\\`*_{}[]()>#+.!~=|-")
