import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest

from pipeline import documents, hub, ingest, records
from pipeline.stage import Refusal

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTINGS: dict[str, Any] = {
    "source": "files",
    "demo_documents": 50,
    "txt_documents": "lines",
    "text_column": "text",
    "invalid_utf8": "replace",
    "max_document_bytes": 1000,
    "hf_revision": None,
    "hf_config": None,
    "hf_split": "train",
}
Run = Callable[..., tuple[list[dict[str, str]], dict[str, Any]]]


def params(**changes: object) -> ingest.Params:
    return ingest.Params(**{**SETTINGS, **changes})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "source"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("explains the folder")
    return folder


@pytest.fixture
def run(source: Path) -> Run:
    def run(**changes: object) -> tuple[list[dict[str, str]], dict[str, Any]]:
        out = {"raw": source.parent / "raw", "ingest.json": source.parent / "ingest.json"}
        ingest.main({"source": source, **out}, params(**changes))
        table = pq.read_table(out["raw"] / "documents.parquet")
        return table.to_pylist(), json.loads(out["ingest.json"].read_text())

    return run


def test_every_kind_of_file_in_one_folder_becomes_documents(source: Path, run: Run) -> None:
    (source / "b.txt").write_bytes(b"first line\nsecond \xff line\n\n")
    (source / "notes").mkdir()
    (source / "notes" / "c.jsonl").write_text('{"text": "an object"}\nbroken\n')
    (source / "a.csv").write_text('id,text\n1,"a, row"\n')
    pq.write_table(pa.table({"text": ["a cell", None]}), source / "d.parquet")
    (source / "picture.png").write_text("x")
    found, report = run()
    assert found == [
        {"text": "a, row", "source": "a.csv"},
        {"text": "first line", "source": "b.txt"},
        {"text": "second \ufffd line", "source": "b.txt"},
        {"text": "a cell", "source": "d.parquet"},
        {"text": "an object", "source": "notes/c.jsonl"},
    ]
    assert report["files_read"] == 4
    assert report["files_skipped_names"] == {"unknown_extension": ["picture.png"]}
    assert (report["documents_in"], report["documents_kept"]) == (8, 5)
    assert {reason: count for reason, count in report["documents_dropped"].items() if count} == {
        "bad_json": 1,
        "blank": 1,
        "no_text": 1,
    }
    assert report["bytes_in"] == report["bytes_kept"] + sum(report["bytes_dropped"].values())
    assert report["bytes_out"] == sum(len(row["text"].encode()) for row in found)
    assert report["first_dropped"]["bad_json"] == "notes/c.jsonl:2"


def test_output_bytes_depend_on_names_and_contents_alone(source: Path, tmp_path: Path) -> None:
    """Order of creation, time zone, locale, hash seed and umask change nothing."""
    code = """
import json, os, sys
from pathlib import Path
from pipeline import ingest
folder, settings, names = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
(folder / "source").mkdir(parents=True)
os.umask(int(os.environ["MASK"], 8))
for name in names:
    (folder / "source" / name).write_text(f"text of {name} ümlaut\\n" * 50, encoding="utf-8")
paths = {"source": folder / "source", "raw": folder / "raw", "ingest.json": folder / "ingest.json"}
ingest.main(paths, ingest.Params(**settings))
"""
    outputs = []
    for seed, zone, mask, names in (("1", "Asia/Tokyo", "022", ["b.txt", "a.txt", "é.txt"]),
                                    ("2", "UTC", "077", ["é.txt", "a.txt", "b.txt"])):  # fmt: skip
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "MASK": mask, "LC_ALL": "C"}
        subprocess.run(
            [sys.executable, "-c", code, str(folder), json.dumps(SETTINGS), *names],
            env=environment,
            cwd=ROOT,
            check=True,
        )
        outputs.append([(folder / "raw" / "documents.parquet").read_bytes(), (folder / "ingest.json").read_bytes()])
    assert outputs[0] == outputs[1]


def test_row_groups_are_bounded_in_rows_and_in_characters(
    source: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "ROW_GROUP_ROWS", 10)
    monkeypatch.setattr(documents, "ROW_GROUP_CHARACTERS", 100)
    wanted = ["x"] * 25 + ["ü" * 40] * 5
    (source / "a.txt").write_text("\n".join(wanted))
    found, _ = run()
    assert [row["text"] for row in found] == wanted
    file = pq.ParquetFile(source.parent / "raw" / "documents.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [10, 10, 7, 3]
    assert b"pandas" not in (file.metadata.metadata or {})


# What is refused


def test_an_empty_folder_is_refused_and_says_what_to_put_there(run: Run, source: Path) -> None:
    with pytest.raises(Refusal, match=r"source has nothing to read: put .txt, .jsonl, .* or set ingest.source to demo"):
        run()
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"], "no output, whole or partial"


def test_a_folder_of_unknown_extensions_alone_is_refused_by_name(run: Run, source: Path) -> None:
    (source / "a.pdf").write_text("x")
    (source / "b.txt").touch()
    with pytest.raises(Refusal, match=r"nothing to read, only empty_file \(b.txt\); unknown_extension \(a.pdf\): put"):
        run()


def test_files_without_a_single_document_are_refused(run: Run, source: Path) -> None:
    (source / "a.txt").write_text("\n \n" + "x" * 1001)
    with pytest.raises(Refusal, match=r"ingest.source: files gave no document; dropped: 2 blank, 1 too_long"):
        run()
    (source / "a.txt").unlink()
    (source / "a.csv").write_text("id,text\n")
    with pytest.raises(Refusal, match=r"ingest.source: files gave no document; dropped: nothing"):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "hub:x"}, "should be demo, files or hf:OWNER/NAME"),
        ({"source": "hf:a/b/c", "hf_revision": COMMIT}, "should be demo, files or hf:OWNER/NAME"),
        ({"source": "hf:owner/name"}, "needs in hf_revision the 40 digits of a commit .*, not None"),
        ({"source": "hf:owner/name", "hf_revision": "main"}, "needs in hf_revision .*, not 'main'"),
        ({"hf_revision": COMMIT}, "hf_revision and hf_config have no meaning with source: files"),
        ({"source": "demo", "hf_config": "en"}, "hf_revision and hf_config have no meaning with source: demo"),
        ({"invalid_utf8": "ignore"}, "'replace', 'drop' or 'refuse'"),
        ({"max_document_bytes": 0}, "greater than or equal to 1"),
        ({"demo_documents": True}, "valid integer"),
    ],
)
def test_parameters_that_are_wrong_or_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        params(**changes)


# The demo corpus


def test_the_demo_ignores_what_lies_in_the_folder(run: Run, source: Path) -> None:
    without, report = run(source="demo")
    (source / "a.txt").write_text("a user's text")
    (source / "pipe").symlink_to("nowhere")
    assert run(source="demo") == (without, report)
    assert {row["source"] for row in without} == {"demo"}
    assert report["documents_kept"] > 50, "fifty documents and the dirt"


def test_broken_bytes_of_the_demo_follow_the_policy(run: Run) -> None:
    _, replaced = run(source="demo", demo_documents=300)
    kept, dropped = run(source="demo", demo_documents=300, invalid_utf8="drop")
    assert replaced["noticed"]["invalid_utf8_replaced"] == dropped["documents_dropped"]["invalid_utf8"] > 0
    assert not any("\ufffd" in row["text"] for row in kept)
    with pytest.raises(Refusal, match=r"demo:\d+: byte \d+ of the record"):
        run(source="demo", demo_documents=300, invalid_utf8="refuse")


# The Hub. A local folder stands in for it: `datasets` builds the same stream from both.


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    pq.write_table(
        pa.table({"text": ["one", None, "three" * 300, "vier é"], "n": [1, 2, 3, 4]}), folder / "train.parquet"
    )
    return folder


def test_rows_of_a_dataset_are_documents_in_its_order(dataset: Path) -> None:
    tally = records.Tally()
    pinned = params(source="hf:owner/name", hf_revision=COMMIT)
    rows = hub.records(str(dataset), pinned, tally)
    assert list(records.documents(rows, str, "hf:owner/name", pinned, tally)) == ["one", "vier é"]
    report = tally.report()
    assert (report["bytes_in"], report["bytes_kept"], report["bytes_dropped"]["too_long"]) == (1510, 10, 1500)
    assert report["first_dropped"] == {"no_text": "hf:owner/name:2", "too_long": "hf:owner/name:3"}


def test_a_dataset_without_the_column_split_or_configuration_is_refused(dataset: Path) -> None:
    for changes, message in (
        ({"text_column": "body"}, r"has no column 'body' \(ingest.text_column\); its columns: text, n"),
        ({"hf_split": "nope"}, "could not be read: Bad split: nope"),
        ({"hf_config": "en"}, "could not be read: BuilderConfig 'en' not found"),
    ):
        pinned = params(source="hf:owner/name", hf_revision=COMMIT, **changes)
        with pytest.raises(Refusal, match=message):
            list(hub.records(str(dataset), pinned, records.Tally()))


HUB = """
import json, sys
from pathlib import Path
from pipeline import ingest, stage
folder = Path(sys.argv[1])
with stage.refusals("ingest"):
    paths = {"source": folder / "source", "raw": folder / "raw", "ingest.json": folder / "ingest.json"}
    ingest.main(paths, ingest.Params(**json.loads(sys.argv[2])))
"""


def read_hub(folder: Path, **environment: str) -> str:
    """What a run says that cannot reach the Hub."""
    pinned = {**SETTINGS, "source": "hf:owner/name", "hf_revision": COMMIT}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(folder), json.dumps(pinned)],
        env={**os.environ, "HF_HOME": str(folder / "cache"), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("into data/source and set ingest.source to files\n")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_without_leave_to_use_the_hub_one_sentence_tells_the_local_way(source: Path) -> None:
    said = read_hub(source.parent, HF_HUB_OFFLINE="1")
    assert said.startswith(f"ingest: hf:owner/name at revision {COMMIT} could not be read (HF_HUB_OFFLINE is set): ")


@pytest.mark.slow
def test_without_a_network_one_sentence_tells_the_local_way(source: Path) -> None:
    """Nobody listens at that port; `datasets` retries for 23 s."""
    said = read_hub(source.parent, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith(f"ingest: hf:owner/name at revision {COMMIT} could not be read: Couldn't reach")


def test_a_local_folder_is_never_taken_for_a_pinned_dataset(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Refusal, match=r"ingest.source: pipeline is also a path here"):
        run(source="hf:pipeline", hf_revision=COMMIT)
