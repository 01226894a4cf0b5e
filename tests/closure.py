"""Which modules of ours a stage executes: its import closure, read from the syntax trees.

    python -m tests.closure           # the code lines of every stage's deps, as dvc.yaml wants them
    python -m tests.closure train     # of one stage

Imports inside functions count, those under TYPE_CHECKING do not: they are never executed. Modules that a stage starts
as other processes count neither: what they do cannot reach an output.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def closure(module: str, root: Path = ROOT) -> list[str]:
    """The files, relative to `root`, that importing and running `module` executes, in sorted order."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file(name, root)
        if name in found or file is None:
            continue
        found[name] = file
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # a package's __init__ runs before its modules
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting.extend(imported(ast.parse(file.read_text(encoding="utf-8")), package))
    return sorted(file.relative_to(root).as_posix() for file in found.values())


def imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """The full names that a module's code imports; `from a import b` gives both `a` and `a.b`."""
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from (inner for branch in child.orelse for inner in (branch, *_executed(branch)))
        else:
            yield child
            yield from _executed(child)


def _file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    return None


if __name__ == "__main__":
    from pipeline import stage

    for stage_name in sys.argv[1:] or stage.read_stages(ROOT / "dvc.yaml"):
        print(f"{stage_name}:")
        print("\n".join(f"      - {file}" for file in closure(f"pipeline.{stage_name}")))
