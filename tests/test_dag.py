import ast
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from flows.dag import downstream, read_dag
from pipeline import stage
from pipeline.stage import Refusal
from tests.closure import ROOT, closure, imported

STAGES = stage.read_stages(ROOT / "dvc.yaml")
MODULES = sorted(ROOT.glob("pipeline/*.py"))
EIGHT = ["ingest", "clean", "tokenize", "split", "train", "sample", "evaluate", "publish"]
every_stage = pytest.mark.parametrize("name", STAGES)
every_module = pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)


# --- what dvc.yaml says --------------------------------------------------------------------------------------------


def test_there_are_the_eight_stages_of_the_design_in_the_order_in_which_they_run():
    assert list(STAGES) == EIGHT


@every_stage
def test_a_stage_lists_exactly_the_code_that_it_executes(name):
    listed = [dep for dep in STAGES[name]["deps"] if dep.endswith(".py")]
    assert listed == closure(f"pipeline.{name}"), f"`python -m tests.closure {name}` prints the right list"


@every_stage
def test_a_stage_runs_again_when_the_locked_set_changes(name):
    assert "requirements.lock" in STAGES[name]["deps"]


@every_stage
def test_a_stage_is_run_by_the_module_of_its_name_and_reads_its_own_section(name):
    assert STAGES[name]["cmd"] == f"python -m pipeline.{name}"
    assert name in STAGES[name]["params"]
    assert all(isinstance(key, str) and "." not in key for key in STAGES[name]["params"]), "whole sections only"


@every_stage
def test_no_two_data_paths_of_a_stage_share_their_last_component(name):
    paths = stage.paths_of(STAGES[name])  # asserts it
    assert all(path.parts[0] in {"data", "models", "reports"} for path in paths.values())


@every_stage
def test_no_output_survives_into_the_next_run(name):
    for kind in ("outs", "metrics", "plots"):
        for entry in STAGES[name].get(kind, []):
            for options in entry.values() if isinstance(entry, dict) else ():
                assert not options.get("persist"), entry


# --- what the code may import --------------------------------------------------------------------------------------


def imports_of(file):
    return {name.partition(".")[0] for name in imported(ast.parse(file.read_text(encoding="utf-8")), "pipeline")}


@every_module
def test_the_pipeline_knows_neither_prefect_nor_dvc_nor_the_flows(file):
    assert not imports_of(file) & {"prefect", "dvc", "flows"}


@every_module
def test_only_tracking_the_registry_and_the_machine_know_mlflow(file):
    assert "mlflow" not in imports_of(file) or file.stem in {"tracking", "registry", "machine"}


@every_module
def test_the_one_import_by_name_is_the_look_up_of_params_classes(file):
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    by_name = [call for call in calls if re.match(r"(importlib\.)?(import_module|__import__|exec|eval)\(", call)]
    assert by_name == (["importlib.import_module(f'pipeline.{section}')"] if file.stem == "stage" else [])


@every_module
def test_no_data_path_is_named_in_code(file):
    """Sentences for people may name one; a string without a blank is no sentence."""
    named = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for text in (part.value for part in ast.iter_child_nodes(node) if isinstance(part, ast.Constant)):
            if not isinstance(text, str):
                continue
            joined = isinstance(node, ast.BinOp | ast.Call) and text in {"data", "models", "reports"}
            if joined or re.fullmatch(r"\S*\b(data|models|reports)/\S*", text):
                named.append(text)
    assert not named, "only dvc.yaml names data paths; take them from `paths`"


def test_importing_the_stages_imports_nothing_heavy():
    modules = ", ".join(f"pipeline.{name}" for name in dict.fromkeys([*STAGES, *sections()]))
    heavy = {"torch", "transformers", "mlflow", "matplotlib", "prefect", "datasets", "pyarrow", "datasketch", "pandas"}
    code = f"import sys, {modules}; print(*sorted({heavy!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


# --- what params.yaml says -----------------------------------------------------------------------------------------


def sections():
    return list(dict.fromkeys(key for definition in STAGES.values() for key in definition["params"]))


def leaves(mapping, *above):
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, *above, key)
        else:
            yield (*above, key)


def test_params_yaml_as_it_is_committed_is_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sorted(stage.load_params()) == sorted(sections())


def test_every_number_of_params_yaml_is_read_somewhere():
    params = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    read = {
        node.attr
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert [".".join(path) for path in leaves(params) if path[-1] not in read] == []


SELF_EXPLAINING = {
    "seed",
    "num_layers",
    "num_heads",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "prompts",
    "max_new_tokens",
}


def test_every_number_of_params_yaml_has_a_unit_or_a_reason_beside_it():
    lines = (ROOT / "params.yaml").read_text().splitlines()
    bare = [
        line.strip()
        for above, line in zip(["", *lines], lines, strict=False)
        if (key := re.match(r"  +(\w+):", line))
        if key[1] not in SELF_EXPLAINING and "#" not in line and not above.strip().startswith("#")
    ]
    assert bare == []


# --- the flow's reading of it --------------------------------------------------------------------------------------


def edges_of_dvc(folder):
    """DVC's own graph, as pairs: from a stage to one that waits for it."""
    command = [sys.executable, "-m", "dvc", "dag", "--dot"]
    dot = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return {(a, b) for a, b in re.findall(r'"([^"]+)" -> "([^"]+)"', dot)}


def edges(dag):
    return {(upstream, name) for name, waits_for in dag.items() for upstream in waits_for}


def project(folder, text):
    (folder / "dvc.yaml").write_text(text)
    return folder / "dvc.yaml"


def test_our_edges_are_those_of_dvc():
    ours = edges(read_dag(ROOT / "dvc.yaml"))
    assert ours
    assert ours == edges_of_dvc(ROOT)


def test_edges_through_folders_files_metrics_plots_and_params_are_those_of_dvc(tmp_path):
    file = project(
        tmp_path,
        """
        stages:
          reader: {cmd: x, deps: [out/folder/one/file.txt, ./reports/m.json, reports/p.csv]}
          writer: {cmd: x, deps: [source], outs: [out/folder]}
          parts: {cmd: x, outs: [{tree/a: {cache: true}}, tree/b]}
          whole: {cmd: x, deps: [tree]}
          measures: {cmd: x, metrics: [{reports/m.json: {cache: false}}], plots: [{reports/p.csv: {x: step}}]}
          tunes: {cmd: x, outs: [best.yaml]}
          tuned: {cmd: [x, x], params: [learning_rate, {best.yaml: [rate]}]}
          alike: {cmd: x, deps: [out/folder2, tree2]}
        """,
    )
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    ours = edges(read_dag(file))
    assert {("writer", "reader"), ("measures", "reader"), ("parts", "whole"), ("tunes", "tuned")} == ours
    assert ours == edges_of_dvc(tmp_path)


@given(
    st.permutations(range(6)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda e: e[0] < e[1]))
)
def test_a_stage_comes_after_all_that_it_waits_for_whatever_the_order_in_the_file(tmp_path_factory, written, chosen):
    lines = ["stages:"]
    for node in written:
        deps = [f"o{a}" for a, b in sorted(chosen) if b == node]
        lines.append(f"  s{node}: {{cmd: x, deps: {deps}, outs: [o{node}]}}")
    file = tmp_path_factory.getbasetemp() / "dvc.yaml"
    file.write_text("\n".join(lines))
    dag = read_dag(file)
    assert edges(dag) == {(f"s{a}", f"s{b}") for a, b in chosen}
    seen = []
    for name, upstream in dag.items():
        assert set(upstream) <= set(seen)
        seen.append(name)
    assert sorted(seen) == [f"s{node}" for node in range(6)]


def test_stages_that_do_not_wait_for_each_other_keep_the_order_of_the_file(tmp_path):
    text = "stages: {z: {cmd: x, outs: [o]}, b: {cmd: x, deps: [o]}, y: {cmd: x}, a: {cmd: x, deps: [o]}}"
    assert list(read_dag(project(tmp_path, text))) == ["z", "b", "y", "a"]


def test_downstream_is_everything_that_waits_directly_or_through_others():
    dag = {"a": (), "b": ("a",), "c": (), "d": ("b", "c"), "e": ("c",)}
    assert downstream(dag, "a") == ["b", "d"]
    assert downstream(dag, "c") == ["d", "e"]
    assert downstream(dag, "e") == []


@pytest.mark.parametrize(
    ("definition", "named"),
    [
        ("{foreach: [a, b], do: {cmd: 'echo ${item}'}}", "foreach"),
        ("{matrix: {size: [1, 2]}, cmd: 'echo ${item.size}'}", "matrix"),
        ("{wdir: sub, cmd: x}", "wdir"),
        ("{frozen: true, cmd: x}", "frozen"),
        ("{vars: [{a: 1}], cmd: x}", "vars"),
        ("{cmd: 'echo ${rate}'}", "${"),
        ("{cmd: x, outs: ['${folder}/out']}", "${"),
        ("{deps: [a]}", "cmd"),
        ("{cmd: ''}", "cmd"),
        ("just text", "mapping"),
        ("", "mapping"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_the_name_of_the_stage(tmp_path, definition, named):
    file = project(tmp_path, f"stages:\n  good: {{cmd: x}}\n  odd-one: {definition}\n")
    with pytest.raises(Refusal, match=rf"stage odd-one: .*{re.escape(named)}") as refusal:
        read_dag(file)
    assert "good" not in str(refusal.value)


def test_all_that_cannot_be_translated_is_named_at_once(tmp_path):
    file = project(tmp_path, "stages: {a: {wdir: x, cmd: x}, b: {cmd: x, frozen: true}, c: {cmd: '${x}'}}")
    with pytest.raises(Refusal, match=r"(?s)stage a: `wdir`.*stage b: `frozen`.*stage c: templating"):
        read_dag(file)


def test_stages_that_wait_for_each_other_are_refused_by_name(tmp_path):
    file = project(tmp_path, "stages: {a: {cmd: x, deps: [b], outs: [a]}, b: {cmd: x, deps: [a], outs: [b]}}")
    with pytest.raises(Refusal, match=r"wait for each other: (a -> b -> a|b -> a -> b)$"):
        read_dag(file)


@pytest.mark.parametrize("text", ["", "stages:", "stages: []", "stages: {}", "stages: [", "a: 1"])
def test_a_file_without_stages_is_refused(tmp_path, text):
    with pytest.raises(Refusal, match=r"dvc\.yaml"):
        read_dag(project(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"no .*dvc\.yaml"):
        read_dag(tmp_path / "dvc.yaml")


# --- the closure ---------------------------------------------------------------------------------------------------


def test_the_closure_follows_imports_in_functions_and_packages_but_not_those_for_type_checkers(tmp_path):
    files = {
        "p/__init__.py": "",
        "p/start.py": "import os\nfrom p import near\ndef f():\n    from p.deep.far import x\n",
        "p/near.py": "if TYPE_CHECKING:\n    from p import typed\nelse:\n    import p.plain\n",
        "p/plain.py": "from p.near import name_not_a_module\n",
        "p/typed.py": "",
        "p/deep/__init__.py": "from . import sibling\n",
        "p/deep/far.py": "from ..late import y\n",
        "p/deep/sibling.py": "",
        "p/late.py": "try:\n    import p.last\nexcept ImportError:\n    pass\n",
        "p/last.py": "",
        "p/alone.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert closure("p.start", tmp_path) == sorted(set(files) - {"p/typed.py", "p/alone.py"})


def test_the_closure_holds_what_python_really_loads():
    names = "(name.replace('.', '/') for name in sys.modules if name.startswith('pipeline.'))"
    code = f"import sys, pipeline.train; print(*{names})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {f"{name}.py" for name in loaded.stdout.split()} <= set(closure("pipeline.train"))
