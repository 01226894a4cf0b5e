"""What holds for the repository as a whole: nothing of one machine in it, nothing unsafe, nothing unpinned."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from pipeline import stage
from tests.closure import ROOT, imported


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


# What is committed, or would be by `git add .`
FILES = [ROOT / name for name in sorted(set(git("ls-files", "-z", "-co", "--exclude-standard").split("\0"))) if name]
FILES = [file for file in FILES if file.is_file()]
CODE = [file for file in FILES if file.suffix == ".py"]


def texts():
    for file in FILES:
        try:
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            assert file.suffix in {".png", ".webp", ".gz", ".parquet", ".svg", ".gif"}, f"{file} is no text"


def lines_with(pattern):
    found = re.compile(pattern)
    return [
        f"{name}:{number}: {line.strip()[:150]}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def pins():
    """Name and version of everything that the two lock files pin."""
    text = (ROOT / "requirements.lock").read_text() + (ROOT / "requirements-dev.lock").read_text()
    pinned = [line.partition("==") for line in text.splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pinned}


# --- nothing of one machine ----------------------------------------------------------------------------------------


def test_no_file_names_a_path_of_one_machine():
    assert lines_with(r"(?<![\w.:/])/(?:work|root|home|Users|mnt|opt)/\w") == []


def test_no_file_names_an_address_of_a_package_registry():
    assert lines_with(r"(?i)index[-_]url|trusted[-]host|find[-]links|/simpl[e]\b|pypi[.]org|pythonhost[e]d") == []


def test_the_text_files_are_tidy():
    for name, text in texts():
        assert "\r" not in text, name
        assert text == "" or (text.endswith("\n") and not text.endswith("\n\n")), f"{name}: one newline at its end"
        if not name.endswith((".md", "LICENSE")):
            assert not re.search(r"[ \t]$", text, re.MULTILINE), f"{name}: blanks at a line's end"


# --- nothing unsafe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_is_pickled_and_yaml_is_read_as_dvc_reads_it(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    roots = {name.partition(".")[0] for name in imported(tree)}
    if file != ROOT / "tests" / "watch" / "sitecustomize.py":  # which tells on whoever does
        assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.save", "torch.load", "pd.read_pickle", "pandas.read_pickle"}, called
            assert not called.endswith(".to_pickle"), called
            for keyword in node.keywords:
                if keyword.arg in {"allow_pickle", "trust_remote_code"}:
                    assert ast.unparse(keyword.value) == "False", ast.unparse(node)


# --- nothing unpinned ----------------------------------------------------------------------------------------------


def test_only_tensors_are_multiplied_by_blas():
    """Of arrays of numpy, OpenBLAS has a kernel for every model of processor, and their last digits differ."""
    of_tensors = {"attention.py", "cross_entropy.py", "prepare.py"}
    found = {
        file.name
        for file in (ROOT / "pipeline").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.MatMult)
        or (isinstance(node, ast.Attribute) and node.attr in {"dot", "vdot", "inner", "matmul", "tensordot", "linalg"})
    }
    assert found == of_tensors


def test_the_lock_files_pin_every_dependency_inside_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pinned = pins()
    for requirement in map(Requirement, wanted):
        assert requirement.specifier, f"{requirement.name} has no bound"
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement.name


def test_every_bound_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    runtime = text[text.index("\ndependencies = [") : text.index("[project.optional-dependencies]")]
    lines = [line for line in runtime.splitlines() if line.strip().startswith('"')]
    assert lines
    assert [line for line in lines if "#" not in line and not line.strip().startswith('"psutil')] == []


def test_every_hook_of_pre_commit_runs_a_pinned_tool():
    config = YAML(typ="safe", pure=True).load((ROOT / ".pre-commit-config.yaml").read_text())
    for repository in config["repos"]:
        if repository["repo"] != "local":
            assert re.fullmatch(r"[0-9a-f]{40}|v?\d+(\.\d+)+", repository["rev"])
            continue
        for hook in repository["hooks"]:
            tool = re.match(r"\.venv/bin/([\w-]+)( |$)", hook["entry"])[1]
            assert canonicalize_name(tool) in pins()


# --- what users and scripts find -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["setup", "repro", "test", "check", "flow", "ui", "bench", "verify"])
def test_the_makefile_has_the_targets_of_the_contract(target):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), "a target, with its line for `make help`"
    assert re.search(rf"^\.PHONY:.*\b{target}\b", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "data/source/README.md"]
)
def test_the_documents_are_there(name):
    assert (ROOT / name).stat().st_size > 100


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "Copyright 2026 The gpt2-pipeline authors" in text


def test_the_graph_in_the_readme_is_the_one_that_dvc_draws():
    command = [sys.executable, "-m", "dvc", "dag", "--mermaid"]
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    block = re.search(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no mermaid block; `dvc dag --mermaid` prints it"
    assert "\n".join(map(str.rstrip, block[1].strip().splitlines())) == "\n".join(
        map(str.rstrip, drawn.strip().splitlines())
    )


def test_git_ignores_what_the_stages_write_and_what_runs_leave():
    outputs = [
        path if isinstance(path, str) else next(iter(path))
        for definition in stage.read_stages(ROOT / "dvc.yaml").values()
        for kind in ("outs", "metrics", "plots")
        for path in definition.get(kind, [])
    ]
    left = [
        "pipeline/__pycache__/x",
        ".runs/x",
        ".replay/x",
        ".prefect/x",
        "mlflow.db",
        "mlflow.db-wal",
        "mlartifacts/x",
        "data/source/mine.txt",
    ]
    left += [".dvc/tmp/x", ".dvc/cache/x", ".dvc/config.local", "reports/.x.json.partial"]
    check = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(check, cwd=ROOT, input="\n".join(outputs + left), capture_output=True, text=True).stdout
    assert sorted(set(outputs + left) - set(ignored.splitlines())) == []


def test_dvc_stays_off_the_network_and_does_not_touch_the_git_index():
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "autostage = false" in config
