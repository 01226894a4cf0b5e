import contextlib
import csv
import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sources
from pipeline.ingest import Params
from pipeline.records import Tally, documents
from pipeline.stage import Refusal

SETTINGS = {
    "source": "files",
    "demo_documents": 10,
    "txt_documents": "lines",
    "text_column": "text",
    "invalid_utf8": "replace",
    "max_document_bytes": 1000,
    "hf_revision": None,
    "hf_config": None,
    "hf_split": "train",
}
PIECES = [
    b"\n",
    b"\r",
    b"\r\n",
    b'"',
    b'""',
    b",",
    b"a",
    b"text",
    b'{"text":',
    b"}",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\xe2",
]
CONTENT = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=9)), max_size=30).map(b"".join)
MANY = settings(max_examples=200, deadline=None)


def read(file: Path, tally: Tally | None = None, **changes: object) -> list[str]:
    ingest = Params(**{**SETTINGS, **changes})
    return list(sources.read_file(file, file.name, ingest, tally or Tally(), file.parent))


def read_bytes(content: bytes, kind: str, tally: Tally | None = None, **changes: object) -> list[str]:
    """The documents of an open file, and the sums checked."""
    ingest = Params(**{**SETTINGS, **changes})
    tally = tally or Tally()
    records, text_of = sources.records_of(io.BytesIO(content), kind, f"file.{kind}", ingest, tally)
    found = list(documents(records, text_of, f"file.{kind}", ingest, tally))
    assert tally.bytes_in == len(content) == tally.bytes_kept + tally.bytes_dropped.total()
    assert tally.documents_in == len(found) + tally.documents_dropped.total()
    return found


# Lines and files of .txt


def test_lf_crlf_and_cr_end_lines_and_nothing_else_does() -> None:
    tally = Tally()
    found = read_bytes("a\nb\r\nc\rd\u2028e\u2029f\x85g\x0bh\x0ci".encode(), "txt", tally)
    assert found == ["a", "b", "c", "d\u2028e\u2029f\x85g\x0bh\x0ci"]
    assert tally.noticed["unicode_line_separator_kept"] == 1


def test_a_byte_order_mark_at_the_start_is_removed_and_counted() -> None:
    tally = Tally()
    assert read_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb", "txt", tally) == ["a", "\ufeffb"]
    assert tally.bytes_dropped["format"] == 3
    assert tally.noticed["byte_order_mark_removed"] == 1


def test_utf_16_is_refused_with_the_command_that_converts_it() -> None:
    with pytest.raises(Refusal, match=r"file.txt is UTF-16: convert it .iconv"):
        read_bytes("hello".encode("utf-16"), "txt")


def test_nul_is_kept_for_the_clean_stage_and_counted() -> None:
    tally = Tally()
    assert read_bytes(b"a\0b\n", "txt", tally) == ["a\0b"]
    assert tally.noticed["nul_kept"] == 1


def test_blank_lines_are_dropped_with_their_bytes() -> None:
    tally = Tally()
    assert read_bytes(b"a\n\n \t\r\nb", "txt", tally) == ["a", "b"]
    assert (tally.documents_dropped["blank"], tally.bytes_dropped["blank"]) == (2, 5)
    assert tally.first_dropped["blank"] == "file.txt:2"


def test_a_whole_file_is_one_document_with_newlines_made_lf() -> None:
    tally = Tally()
    assert read_bytes(b"a\r\n\r\nb\rc\n", "txt", tally, txt_documents="files") == ["a\n\nb\nc\n"]
    assert tally.noticed["carriage_return_to_newline"] == 1


def test_invalid_utf8_is_replaced_dropped_or_refused_as_the_parameter_says() -> None:
    content = b"good\nb\xffd\n"
    assert read_bytes(content, "txt", invalid_utf8="replace") == ["good", "b\ufffdd"]
    tally = Tally()
    assert read_bytes(content, "txt", tally, invalid_utf8="drop") == ["good"]
    assert (tally.documents_dropped["invalid_utf8"], tally.first_dropped["invalid_utf8"]) == (1, "file.txt:2")
    with pytest.raises(Refusal, match=r"file.txt:2: byte 2 of the record \(0xFF\) is not UTF-8; .* replace or drop"):
        read_bytes(content, "txt", invalid_utf8="refuse")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
@given(data=st.data())
@MANY
def test_any_bytes_are_read_or_refused_and_every_byte_is_counted(kind: str, data: st.DataObject) -> None:
    content = data.draw(CONTENT)
    header = data.draw(st.sampled_from([b"", b"text\n", b"id,text\r\n"]))
    policy = data.draw(st.sampled_from(["replace", "drop", "refuse"]))
    limit = data.draw(st.integers(1, 40))
    whole = data.draw(st.sampled_from(["lines", "files"]))
    with contextlib.suppress(Refusal):
        for text in read_bytes(
            header + content, kind, invalid_utf8=policy, max_document_bytes=limit, txt_documents=whole
        ):
            text.encode()


@given(content=CONTENT, size=st.integers(1, 5), quotes=st.booleans())
@MANY
def test_records_do_not_depend_on_where_the_chunks_end(content: bytes, size: int, quotes: bool) -> None:
    def cut(chunk_bytes: int) -> list[object]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
            parts = sources.chunks(io.BytesIO(content), "f", Tally())
            end = sources.CSV_ROW if quotes else sources.LINE
            try:
                return list(sources.split(parts, end, "f", 10))
            except Refusal as refusal:
                return [str(refusal)]

    assert cut(size) == cut(1000)


def test_a_document_over_the_limit_is_dropped_and_its_bytes_counted() -> None:
    tally = Tally()
    assert read_bytes(b"x" * 10 + b"\n" + b"y" * 11 + b"\r\n" + b"z\n", "txt", tally, max_document_bytes=10) == [
        "x" * 10,
        "z",
    ]
    assert (tally.documents_dropped["too_long"], tally.bytes_dropped["too_long"]) == (1, 13)
    assert tally.first_dropped["too_long"] == "file.txt:2"


# .jsonl


def test_jsonl_takes_the_text_of_each_object() -> None:
    lines = b'{"text": "one\\ntwo", "id": 1}\r\n{"id": 2, "text": "\\u00e9\\ud83d\\ude00"}'
    assert read_bytes(lines, "jsonl") == ["one\ntwo", "é😀"]


def test_bad_json_lines_are_dropped_under_a_reason_with_the_first_place() -> None:
    lines = b'{"text": "a"}\n{"text"\n' + b"[" * 100_000 + b'\n[1]\n{"text": 5}\n{"t": ""}\n'
    tally = Tally()
    assert read_bytes(lines, "jsonl", tally, max_document_bytes=10**6) == ["a"]
    assert tally.documents_dropped["bad_json"] == 2
    assert tally.documents_dropped["no_text"] == 3
    assert tally.first_dropped == {"bad_json": "file.jsonl:2", "no_text": "file.jsonl:4"}


def test_a_file_of_bad_json_lines_alone_is_refused_with_its_first_line() -> None:
    with pytest.raises(Refusal, match=r"file.jsonl: no usable record among 2. file.jsonl:2: not JSON"):
        read_bytes(b"\nhello\nworld\n", "jsonl")


def test_a_jsonl_file_without_the_key_is_refused_with_the_keys_it_has() -> None:
    with pytest.raises(Refusal, match=r"file.jsonl:1: no text under the key 'text' .*its keys: id, body"):
        read_bytes(b'{"id": 1, "body": "x"}\n', "jsonl")


def test_half_a_surrogate_pair_follows_the_policy_for_invalid_utf8() -> None:
    assert read_bytes(b'{"text": "a\\ud800b"}', "jsonl") == ["a\ufffdb"]
    tally = Tally()
    assert read_bytes(b'{"text": "a\\ud800b"}', "jsonl", tally, invalid_utf8="drop") == []
    assert tally.documents_dropped["invalid_utf8"] == 1


# .csv


def test_csv_fields_may_hold_newlines_commas_and_quotes() -> None:
    assert read_bytes(b'id,text\r\n1,"a\nb, ""c"""\r\n2,d "e" f\n', "csv") == ['a\nb, "c"', 'd "e" f']


CELL = st.text(st.sampled_from('a",\n\r ')) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5)


@given(rows=ROWS)
@MANY
def test_what_the_csv_module_writes_is_read_back(rows: list[tuple[str, str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("id", "text"), *rows])
    wanted = [text.replace("\r\n", "\n").replace("\r", "\n") for _, text in rows if text and not text.isspace()]
    assert read_bytes(file.getvalue().encode(), "csv") == wanted


def test_a_row_with_another_number_of_columns_is_dropped_not_cut_at_the_comma() -> None:
    tally = Tally()
    assert read_bytes(b"text\nfine\nHello, world\n", "csv", tally) == ["fine"]
    assert tally.documents_dropped["bad_csv"] == 1
    assert tally.first_dropped["bad_csv"] == "file.csv:3"


def test_a_stray_quote_costs_its_neighbour_and_no_more() -> None:
    tally = Tally()
    rows = b'id,text\n1,one\n2,"two\n3,"three"\n4,four\n5,"five"\n'
    assert read_bytes(rows, "csv", tally) == ["one", "four", "five"]
    assert tally.first_dropped["bad_csv"] == "file.csv:3"


def test_a_quote_that_is_never_closed_is_refused_with_its_line() -> None:
    with pytest.raises(Refusal, match=r"file.csv:3: a quote in the row that begins here is never closed"):
        read_bytes(b'text\none\n"two\n' + b"three\n" * 1000, "csv")


def test_a_csv_without_the_column_is_refused_with_the_columns_it_has() -> None:
    with pytest.raises(Refusal, match=r"file.csv:1: 0 columns are called 'text' .*: id, body"):
        read_bytes(b"id,body\n1,x\n", "csv")
    with pytest.raises(Refusal, match=r"file.csv:1: 2 columns are called 'text'"):
        read_bytes(b"text,text\n1,x\n", "csv")


# .gz


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_each_kind_is_read_from_gzip_as_well(kind: str, tmp_path: Path) -> None:
    plain = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["one", "two"]}), plain)
    else:
        plain.write_text({"txt": "", "jsonl": "", "csv": "text\n"}[kind])
        with plain.open("a") as file:
            file.writelines(json.dumps({"text": w}) + "\n" if kind == "jsonl" else w + "\n" for w in ("one", "two"))
    packed = tmp_path / f"A.{kind.upper()}.GZ"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    tally, tally_gz = Tally(), Tally()
    assert read(plain, tally) == read(packed, tally_gz) == ["one", "two"]
    assert tally.report() == tally_gz.report()
    assert sorted(tmp_path.iterdir()) == [packed, plain]


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_a_damaged_gzip_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}.gz"
    whole = gzip.compress(b"some text " * 1000)
    cut, wrong_code, wrong_sum = whole[:-9], whole[:10] + b"\xff" + whole[11:], whole[:-8] + bytes(8)
    for damaged in (cut, wrong_code, wrong_sum, b"no gzip"):
        file.write_bytes(damaged)
        with pytest.raises(Refusal, match=f"a.{kind}.gz is damaged or no gzip file .*fetch it again"):
            read(file)


# .parquet


def test_parquet_rows_are_documents_and_null_is_no_text(tmp_path: Path) -> None:
    tally = Tally()
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        pq.write_table(
            pa.table({"id": [1, 2, 3], "text": pa.array(["a", None, "é" * 501], kind)}), tmp_path / "a.parquet"
        )
        assert read(tmp_path / "a.parquet", tally) == ["a"]
    assert tally.report()["bytes_in"] == 3 * 1003
    assert (tally.documents_dropped["no_text"], tally.documents_dropped["too_long"]) == (3, 3)
    assert tally.first_dropped["too_long"] == "a.parquet:3"


@pytest.mark.parametrize("column", [{"body": ["a"]}, {"text": [1]}, {"text": [b"a"]}, {"text": [["a"]]}])
def test_parquet_without_text_in_the_column_is_refused_with_its_columns(column: dict, tmp_path: Path) -> None:
    table = pa.table(column)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(Refusal, match=rf"a.parquet: not one column 'text' .*: {table.schema[0].name} \("):
        read(tmp_path / "a.parquet")


def test_invalid_utf8_in_parquet_follows_the_policy(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a\ufffdb"]


def test_damaged_parquet_is_refused_by_name_wherever_the_damage_is(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i} " * 5 for i in range(50)]}), file)
    whole = file.read_bytes()
    refused = 0
    for end in range(0, len(whole), 37):
        file.write_bytes(whole[:end])
        with pytest.raises(Refusal, match=r"a.parquet is damaged or no parquet file"):
            read(file)
    for place in range(4, len(whole), 11):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read(file)
        except Refusal as refusal:
            refused += 1
            assert "a.parquet" in str(refusal)
    assert refused > 10


# Folders


def test_files_are_found_in_the_order_of_the_bytes_of_their_paths(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.txt", "a-1.txt", "Z.csv", "é.txt", "a/b/c.jsonl.gz", "a.txt"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [sources.name_of(path, tmp_path) for path in sources.find_files(tmp_path, Tally())]
    assert found == ["Z.csv", "a-1.txt", "a.txt", "a/b/c.jsonl.gz", "a/z.txt", "b.txt", "é.txt"]


def test_what_is_no_document_file_is_skipped_and_counted_by_name(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about this folder")
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "scan.pdf").write_text("x")
    (tmp_path / "noextension").write_text("x")
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "inside.txt").write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "round").symlink_to(".")
    (tmp_path / "link.txt").symlink_to("good.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with short_socket(tmp_path / "socket.txt"):
        tally = Tally()
        found = [path.name for path in sources.find_files(tmp_path, tally)]
    assert found == ["good.txt", "link.txt"]
    assert tally.files_skipped == {
        "hidden": [".cache", ".hidden.txt"],
        "empty_file": ["empty.txt"],
        "unknown_extension": ["noextension", "scan.pdf"],
        "special_file": ["pipe.txt", "socket.txt"],
        "linked_folder": ["round"],
        "link_loop": ["self.txt"],
    }


@contextlib.contextmanager
def short_socket(path: Path) -> Iterator[None]:
    """A Unix socket; its address may have about 100 bytes, so it is bound from inside its folder."""
    before = Path.cwd()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as end:
        os.chdir(path.parent)
        try:
            end.bind(path.name)
        finally:
            os.chdir(before)
        yield


def test_a_file_name_that_is_not_utf8_is_read_and_named_with_escapes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("x")
    assert [sources.name_of(found, tmp_path) for found in sources.find_files(tmp_path, Tally())] == ["caf\\xe9.txt"]
    assert read(path) == ["x"]


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("nowhere.txt")
    with pytest.raises(Refusal, match=r"cannot read .*a.txt \(No such file or directory\): mend it, or move it away"):
        sources.find_files(tmp_path, Tally())


@contextlib.contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder of a user whom permissions bind: root (in a container) becomes nobody for the while."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_a_file_or_folder_without_permission_is_refused_with_the_command_that_mends_it() -> None:
    with ordinary_user() as folder:
        (folder / "a.txt").write_text("x")
        (folder / "a.txt").chmod(0)
        with pytest.raises(Refusal, match=r"cannot read .*a.txt \(Permission denied\): chmod u\+r it"):
            read(folder / "a.txt")
        (folder / "inner").mkdir(mode=0)
        with pytest.raises(Refusal, match=r"cannot list .*inner \(Permission denied\): chmod u\+rx it"):
            sources.find_files(folder, Tally())
        (folder / "inner").chmod(0o700)


# Memory

READ_ALL = """
import json, sys
from pathlib import Path
from pipeline import ingest
folder = Path(sys.argv[1])
params = ingest.Params(**json.loads(sys.argv[2]))
ingest.main({"source": folder / "source", "raw": folder / "raw", "ingest.json": folder / "ingest.json"}, params)
print([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0].split()[1])
"""


@pytest.mark.slow
def test_a_line_of_one_gigabyte_is_never_held(tmp_path: Path) -> None:
    gigabyte = 10**9
    source = tmp_path / "source"
    source.mkdir()
    for name, head, tail in (("a.txt", "", "\nlast"), ("b.jsonl", '{"text": "', '"}\n{"text": "last"}'),
                             ("c.csv", 'text\n"', '"\nlast\n')):  # fmt: skip
        with (source / name).open("wb") as file:
            file.write(head.encode())
            file.seek(gigabyte, os.SEEK_CUR)  # a hole: NULs that take no room on the disk
            file.write(tail.encode())
    with gzip.open(source / "d.txt.gz", "wb", compresslevel=1) as packed:
        for _ in range(300):
            packed.write(bytes(10**6))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path), json.dumps({**SETTINGS, "max_document_bytes": 1000000})],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads((tmp_path / "ingest.json").read_text())
    assert pq.read_table(tmp_path / "raw" / "documents.parquet")["text"].to_pylist() == ["last"] * 3
    assert report["documents_dropped"]["too_long"] == 4
    assert report["bytes_dropped"]["too_long"] > 3.3e9
    assert int(done.stdout.splitlines()[-1]) < 300_000, "peak resident memory in kB; 160,000 is pyarrow itself"


@pytest.mark.slow
def test_parquet_is_not_read_by_the_row_group(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    batch = pa.table({"text": [f"{number} " + os.urandom(450).hex() for number in range(400_000)]})
    pq.write_table(batch, source / "a.parquet", row_group_size=400_000, compression="none", use_dictionary=False)
    assert (source / "a.parquet").stat().st_size > 3.5e8
    del batch
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path), json.dumps(SETTINGS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.splitlines()[-1]) < 350_000, "peak resident memory in kB; the row group alone has 360,000"
