"""The documents say what is there: code in the guide is the code, anchors and files exist, the tree is complete."""

import re
from pathlib import Path

import pytest

from pipeline import rules

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/source/README.md"])
GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_code_in_the_guide_is_the_code_that_runs():
    def stripped(text: str) -> str:  # indented or not
        return "\n".join(line.strip() for line in text.splitlines())

    code = "\n".join(stripped(file.read_text(encoding="utf-8")) for file in ROOT.glob("pipeline/*.py"))
    quoted = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(quoted) >= 8
    for block in quoted:
        assert stripped(block) in code, block


def test_every_verdict_has_its_section_with_its_rule():
    flat = " ".join(GUIDE.split())
    for rule in (*rules.RULES, rules.HEALTHY):
        assert rule.verdict in anchors(GUIDE)
        assert f"*{rule.sentence}*" in flat, rule.verdict


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        aim = page.parent / file if file else page
        assert aim.exists(), target
        assert not anchor or anchor in anchors(aim.read_text(encoding="utf-8")), target


def test_pages_that_the_code_points_to_exist():
    for file in ROOT.glob("pipeline/*.py"):
        for page, anchor in re.findall(r"(docs/\w+\.md)#(\w+)", file.read_text(encoding="utf-8")):
            assert anchor in anchors((ROOT / page).read_text(encoding="utf-8")), f"{file.name}: {page}#{anchor}"


def test_the_file_tree_of_the_readme_names_every_module():
    tree = README.split("## The files")[1].split("```")[1]
    for file in [*ROOT.glob("pipeline/*.py"), *ROOT.glob("flows/*.py"), *ROOT.glob("examples/*.py")]:
        if file.name != "__init__.py":
            assert re.search(rf"\b{re.escape(file.name)}\b", tree), file.name


def test_commands_of_the_readme_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`", README)) <= targets
