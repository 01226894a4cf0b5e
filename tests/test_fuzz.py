"""Bad input by the thousand: whatever comes is read or refused, in one message and in time, and every byte counted.

By default a few dozen examples of everything; `make fuzz` runs thousands (EXAMPLES=10000).
"""

import contextlib
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline import clean, corpus, documents, ingest, stage, tokenize
from pipeline.leakage import Params as LeakageParams
from pipeline.model import Params as ModelParams
from pipeline.records import Tally
from pipeline.sources import read_file
from pipeline.split import Params as SplitParams
from pipeline.stage import Refusal
from tests import nasty
from tests.closure import ROOT
from tests.test_sources import CONTENT

EXAMPLES = int(os.environ.get("EXAMPLES", "20"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
LEAKAGE = LeakageParams(ngram_size=13, near_duplicate_similarity=0.8, minhash_permutations=128)
INGEST: dict[str, Any] = {
    "source": "files",
    "demo_documents": 1,
    "txt_documents": "lines",
    "text_column": "text",
    "invalid_utf8": "replace",
    "max_document_bytes": 10_000,
    "hf_revision": None,
    "hf_config": None,
    "hf_split": "train",
}
CLEAN: dict[str, Any] = {
    "unicode_form": "NFC",
    "min_characters": 1,
    "max_characters": 5000,
    "max_broken_share": 0.5,
    "near_duplicate_similarity": 0.8,
    "minhash_permutations": 16,
    "min_documents": 0,
}


@contextlib.contextmanager
def in_time(seconds: float = 20) -> Iterator[None]:
    """Fail what computes for longer than that; a busy machine does not count."""

    def fail(*_: object) -> None:
        raise AssertionError(f"still at it after {seconds} s of computing")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def perhaps_refused() -> Iterator[None]:
    """Whatever is raised ends as a message that fits on a screen and does nothing to a terminal."""
    said = io.StringIO()
    try:
        with in_time(), contextlib.redirect_stderr(said), stage.refusals("fuzz"):
            yield
    except SystemExit as end:
        message = said.getvalue().removesuffix("\n")
        assert end.code == 1 and 10 < len(message) < 4000, message[:500]
        assert len(message.split("\n")) <= 25
        assert all(line.isprintable() for line in message.split("\n")), ascii(message)


# From files to tokens

JSON = st.recursive(
    st.one_of(
        st.sampled_from(["1e400", "-1e400", "NaN", "-Infinity", "9" * 5000, "1" + "0" * 400, "-0", "null", "tru", ""]),
        st.sampled_from(['"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"a', '"\\x"', '"\x00"', '"\u2028"', "'a'"]),
        st.text(max_size=20).map(json.dumps),
        st.text(max_size=20).map(lambda text: json.dumps(text, ensure_ascii=False)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda some: f"[{','.join(some)}]"),
        st.lists(st.tuples(st.sampled_from(["text", "id", "\x1b"]), inner), max_size=3).map(
            lambda some: "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in some) + "}"
        ),
    ),
    max_leaves=6,
)
JSONL = st.lists(st.one_of(JSON, JSON.map(lambda value: f'{{"text": {value}}}')), max_size=8).map(
    lambda lines: "\n".join(lines).encode()
)
PROSE = st.lists(st.text(max_size=60), max_size=8).map(lambda lines: "\n".join(lines).encode())
BYTES = st.one_of(CONTENT, CONTENT.map(lambda it: b"text\n" + it), JSONL, PROSE)
# Names as bytes; "/" and NUL cannot be in them. The dot files are hidden, one name is no extension's.
STEMS = st.lists(
    st.sampled_from([b"a", b"\n", b"'", b'"', b"-", b" ", b"\xff", b"\xc3\xa9", b"$(x)", b"\x1b[2J", b".", b"*"]),
    min_size=1,
    max_size=6,
)
NAMES = st.tuples(STEMS.map(b"".join), st.sampled_from([b"txt", b"jsonl", b"csv", b"JSONL", b"md"])).map(b".".join)


@given(
    folder=st.dictionaries(NAMES, st.tuples(BYTES, st.booleans()), max_size=4),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "txt_documents": st.just("files"),
            "invalid_utf8": st.sampled_from(["drop", "refuse"]),
            "max_document_bytes": st.integers(1, 40),
        },
    ),
    form=st.sampled_from(["NFC", "NFKC", "none"]),
)
@FUZZ
def test_every_document_of_any_folder_is_found_in_the_tokens_or_dropped_by_a_counted_reason(
    folder: dict[bytes, tuple[bytes, bool]], changes: dict[str, Any], form: str
) -> None:
    with tempfile.TemporaryDirectory() as place, perhaps_refused():
        here = Path(place)
        names = ("source", "raw", "clean", "tokens", "ingest.json", "clean.json", "tokenize.json")
        paths = {name: here / name for name in names}
        paths["source"].mkdir()
        num_bytes = 0
        for name, (content, packed) in folder.items():
            file = Path(os.fsdecode(os.fsencode(paths["source"]) + b"/" + name + b".gz" * packed))
            file.write_bytes(gzip.compress(content) if packed else content)
            read = not name.startswith(b".") and not name.endswith(b".md") and (content or packed)
            num_bytes += len(content) if read else 0
        try:
            ingest.main(paths, ingest.Params(**INGEST | changes))
            clean.main(paths, clean.Params(**CLEAN | {"unicode_form": form}))
            split = SplitParams(validation_fraction=0.2, test_fraction=0.2, min_documents=1, leakage=LEAKAGE, seed=1)
            base = ModelParams(base="scratch", revision=None)
            tokenize.main(paths, base, split, tokenize.Params(vocabulary_size=300, min_frequency=2))
        finally:  # refused or not, there is nothing half done
            assert not list(here.rglob("*.partial"))
        ingested, cleaned, tokenized = (
            json.loads(paths[name].read_text()) for name in ("ingest.json", "clean.json", "tokenize.json")
        )
        assert ingested["bytes_in"] == num_bytes
        for report in (ingested, cleaned):
            assert report["documents_in"] == report["documents_kept"] + sum(report["documents_dropped"].values())
            assert report["bytes_in"] == report["bytes_kept"] + sum(report["bytes_dropped"].values())
        assert (ingested["documents_kept"], ingested["bytes_out"]) == (cleaned["documents_in"], cleaned["bytes_in"])
        ((texts,),) = documents.read(paths["clean"] / "documents.parquet", "text")
        tokens, tokenizer = (
            corpus.load(paths["tokens"]),
            Tokenizer.from_file(f"{place}/tokens/tokenizer/tokenizer.json"),
        )
        found = [tokenizer.decode(tokens.document(i).tolist(), skip_special_tokens=False) for i in range(len(texts))]
        assert found == texts
        assert tokens.num_bytes.sum() == tokenized["num_bytes"] == cleaned["bytes_kept"]
        assert tokens.num_documents == cleaned["documents_kept"] == tokenized["documents_in"]


# Parquet


def small_parquets() -> list[bytes]:
    texts = [f"document {i} " * 3 for i in range(40)] + [None]
    table = pa.table({"id": list(range(41)), "text": texts, "nested": [[1, 2]] * 41})
    kinds: list[dict[str, Any]] = [
        {"compression": "none"},
        {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True},
        {"compression": "gzip", "data_page_version": "2.0", "row_group_size": 7},
        {"compression": "snappy", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ]
    written = []
    for kind in kinds:
        file = io.BytesIO()
        pq.write_table(table, file, **kind)
        written.append(file.getvalue())
    return written


PARQUETS = small_parquets()
EDITS = st.lists(
    # Where, as a share of the file from its end (the footer is there); how many bytes go; what comes instead.
    st.tuples(st.floats(0, 1), st.integers(0, 8), st.one_of(st.binary(max_size=8), st.just(b"\xff" * 8))),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for share, length, new in edits:
        place = len(content) - int(share**2 * len(content))
        content = content[:place] + new + content[place + length :]
    return content


@given(original=st.sampled_from(PARQUETS), edits=EDITS)
@FUZZ
def test_any_damage_to_a_parquet_file_is_refused_or_read_and_counted(original: bytes, edits: Any) -> None:
    with tempfile.TemporaryDirectory() as place, perhaps_refused():
        file, tally = Path(place) / "a.parquet", Tally()
        file.write_bytes(edited(original, edits))
        found = list(read_file(file, "a.parquet", ingest.Params(**INGEST), tally, Path(place)))
        assert tally.report()["bytes_out"] >= sum(map(len, found))


@given(edits=EDITS)
@FUZZ
def test_any_damage_to_our_own_documents_is_refused_or_changes_nothing(edits: Any) -> None:
    with tempfile.TemporaryDirectory() as place, perhaps_refused():
        file = Path(place) / "documents.parquet"
        documents.write(file, ("text", "sha256"), [(f"text {i}", "ab" * 32) for i in range(30)])
        sound = list(documents.read(file, "text", "sha256"))
        file.write_bytes(edited(file.read_bytes(), edits))
        found = [texts for texts, _ in documents.read(file, "text", "sha256")]
        assert all(isinstance(text, str) for texts in found for text in texts)
        assert len(found) <= len(sound) + 1


# Parameters

GOOD = (ROOT / "params.yaml").read_text(encoding="utf-8")
KEYS = sorted(set(re.findall(r"^ +(\w+):", GOOD, re.MULTILINE)))
VALUES = st.one_of(
    st.sampled_from(
        [
            "1e400",
            "-1e400",
            ".nan",
            "-.inf",
            "0x" + "f" * 5000,
            "0o" + "7" * 9000,
            "9" * 5000,
            "1" + "0" * 400,
            "-0",
            "1_0",
        ]
    ),
    st.sampled_from(
        ["", "~", "''", "[]", "{}", "*a", "&a [*a]", "&a {<<: *a}", "|", ">-", "? ", "- -", "2024-99-99", "yes"]
    ),
    st.sampled_from(
        ['"\\ud800"', '"\\0"', '"\\x1b[2J"', "'", "[", "}", "%", "@", "`", "\t", "#", "a: b", "\x85", "\ufeff"]
    ),
    st.tuples(
        st.sampled_from(
            [
                "int",
                "float",
                "bool",
                "null",
                "timestamp",
                "binary",
                "set",
                "omap",
                "pairs",
                "str",
                "seq",
                "map",
                "python/object:os.system",
            ]
        ),
        st.sampled_from(['""', "x", "[]", "{}", "[[a, b, c]]", "1", "~"]),
    ).map(lambda it: f"!!{it[0]} {it[1]}"),
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
)
LINES = st.one_of(
    VALUES, st.tuples(st.sampled_from(KEYS), VALUES).map(": ".join), st.text(max_size=20).map("  {}: 1".format)
)


def bomb(node: str, alias: str) -> str:
    """Nine levels, each ten times the one below: a billion of whatever is at the bottom."""
    levels = [f"a0: &a0 {node}"]
    return "\n".join(levels + [alias.format(i, ",".join([f"*a{i - 1}"] * 10)) for i in range(1, 10)]) + "\n"


BOMBS = [
    bomb("[lol]", "a{0}: &a{0} [{1}]"),
    bomb("{x: 1}", "a{0}: &a{0} {{<<: [{1}]}}"),
    bomb("x" * 999, "a{0}: &a{0} [{1}]"),
]


def load_params(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), perhaps_refused():
        Path("dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
        Path("params.yaml").write_bytes(content)
        for section in stage.load_params().values():
            section.model_dump_json()


@given(
    changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3),
    lines=st.lists(st.tuples(st.integers(0, GOOD.count("\n")), LINES), max_size=3),
    edits=st.one_of(st.just([]), EDITS),
)
@FUZZ
def test_any_params_yaml_is_accepted_or_refused_in_a_few_lines(changes: Any, lines: Any, edits: Any) -> None:
    text = GOOD
    for key, value in changes:
        text = re.sub(
            rf"^( +{key}:)[^#\n]*", lambda found, value=value: f"{found[1]} {value} ", text, count=1, flags=re.M
        )
    written = text.splitlines()
    for place, line in lines:
        written.insert(place, line)
    load_params(edited("\n".join(written).encode("utf-8", "surrogatepass"), edits))


@pytest.mark.parametrize(
    "text",
    [
        *BOMBS,
        BOMBS[0] + GOOD.replace("base: scratch", "base: *a9"),
        BOMBS[0] + GOOD.replace('- "The old"', "- *a9"),
        GOOD.replace('- "The old"', "\n".join("    - 1" for _ in range(20_000))),
        "- " * 100_000,
        "{a: " * 50_000,
        "? " * 100_000,
        "a: " + "x" * 10**7,
        "\n".join(f"s{i}: &a{i} 1" for i in range(3000)),
    ],
    ids=lambda text: text[:12] + text[-12:],
)
def test_a_params_yaml_that_would_take_gigabytes_or_hours_is_refused_at_once(text: str) -> None:
    with in_time(5):
        load_params(text.encode())
        assert "\n" in text or len(text) > 100  # the message was checked


@pytest.mark.parametrize("aim", ["/dev/zero", "/dev/full", "pipe", "folder", "nowhere", "params.yaml"])
def test_a_params_yaml_that_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aim: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("params.yaml").symlink_to(aim)
    Path("dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with in_time(5), pytest.raises(Refusal, match=r"params\.yaml"):
        stage.load_params()


# Files that have broken others: read by a process of its own, whose memory and time are measured

READ = r"""
import json, re, sys, time
from pathlib import Path
from pipeline import clean, ingest, stage
params = stage.load_params()
files = params["ingest"].model_copy(update={"source": "files"})
for folder in map(Path, sys.argv[1:]):
    start_s = time.process_time()
    paths = {name: folder / name for name in ("source", "raw", "clean", "ingest.json", "clean.json")}
    try:
        ingest.main(paths, files)
        clean.main(paths, params["clean"])
        outcome = "read"
    except stage.Refusal as refusal:
        outcome = str(refusal)
    peak_kb = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps([folder.name, outcome, time.process_time() - start_s, peak_kb]), file=sys.stderr, flush=True)
"""
PEAK_KB = 450_000  # of which Python, pyarrow and numpy take 160,000


def read_in_a_process(*folders: Path) -> dict[str, tuple[str, float, int]]:
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    return {name: (outcome, seconds, peak_kb) for name, outcome, seconds, peak_kb in rows}


READ_WHOLE = {  # what is not refused
    "archive.tar.gz", "archive.txt", "archive.zip", "bom.txt", "columns.csv", "commas.csv", "duplicates.jsonl",
    "empty.parquet", "invalid.txt", "late_marks.txt", "line.txt", "marks.txt", "newlines.txt.gz", "nuls.txt",
    "numbers.jsonl", "quotes.csv", "returns.txt", "separators.txt", "surrogates.jsonl", "twice.txt.gz",
    "zeros.jsonl.gz", "zeros.txt.gz",
}  # fmt: skip


@pytest.mark.slow
def test_files_that_have_broken_others_are_read_or_refused_in_time_and_in_little_memory(tmp_path: Path) -> None:
    for name, write in nasty.FILES.items():
        (tmp_path / name / "source").mkdir(parents=True)
        (tmp_path / name / "source" / "good.txt").write_text("a good document beside the bad one\n")
        write(tmp_path / name / "source" / name)
    found = read_in_a_process(*(tmp_path / name for name in nasty.FILES))
    assert {name for name, (outcome, _, _) in found.items() if outcome == "read"} == READ_WHOLE
    for name, (outcome, seconds, peak_kb) in found.items():
        assert outcome == "read" or name in outcome, "the file is named"
        assert seconds < 20, name
        assert peak_kb < PEAK_KB, name
    (texts,) = zip(*documents.read(tmp_path / "archive.zip" / "clean" / "documents.parquet", "text"), strict=True)
    assert texts == (["a good document beside the bad one"],)
    assert not list(tmp_path.rglob("escaped.txt")), "no archive is unpacked"


def test_names_links_pipes_and_devices_that_a_folder_can_hold_do_no_harm(tmp_path: Path) -> None:
    nasty.strange_folder(tmp_path / "source")
    ((outcome, seconds, peak_kb),) = read_in_a_process(tmp_path).values()
    assert (outcome, seconds < 20, peak_kb < PEAK_KB) == ("read", True, True)
    report = json.loads((tmp_path / "ingest.json").read_text())
    assert report["files_read"] == 12
    assert report["documents_kept"] == 11
    assert report["documents_dropped"]["too_long"] == 1
    assert report["files_skipped"] == {"link_loop": 1, "linked_folder": 1, "special_file": 5}
    names = {name for (names,) in documents.read(tmp_path / "raw" / "documents.parquet", "source") for name in names}
    assert {"-rf.txt", "new\nline.txt", "\\xff\\xfe.txt", f"{'deeper/' * 60}found.txt"} < names
