"""Model folders that an attacker made: refused in one sentence, before they run anything or take much memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import bpe, files, foreign, generate, model, tokenize
from pipeline.stage import Refusal
from tests.closure import ROOT
from tests.test_fuzz import EDITS, FUZZ, edited, in_time

HEADER = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder, tiny."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("sound") / "model"
    shape = GPT2Config(vocab_size=300, n_positions=16, n_layer=2, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    bpe.train(iter([["some text"] * 9]), 300, 2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def base(folder: Path) -> model.Params:
    return model.Params(base=str(folder), revision=files.sha256_of(folder))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_sound_folder_is_loaded_and_one_of_links_into_a_store_too(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "cache" / "files" / "md5"
    for number, file in enumerate(sorted(folder.iterdir())):
        kept = store / f"{number:02x}" / f"{number:030x}"
        kept.parent.mkdir(parents=True)
        file.rename(kept)
        file.symlink_to(kept)
    assert model.load_pretrained(base(folder)).num_parameters() == generate.load(folder)[0].num_parameters()


# Code

CODE = 'open("executed", "w").close()\n'


def bring_code(folder: Path) -> None:
    (folder / "evil.py").write_text(CODE)
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    change(folder / "config.json", auto_map=names)
    change(folder / "tokenizer_config.json", auto_map=names)


def test_code_that_a_model_brings_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bring_code(folder)
    model.load_tokenizer(base(folder))
    model.load_pretrained(base(folder))
    generate.load(folder)
    change(folder / "config.json", model_type="unheard of")
    for load in (model.load_pretrained, lambda it: model.load_trained(Path(it.base))):
        with pytest.raises(Refusal, match=r"custom code|does not recognize|not recognize") as caught:
            load(base(folder))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


EVIL = b'cbuiltins\nexec\n(S\'open("executed","w")\'\ntR.'  # unpickled, this runs the code


def test_pickled_weights_are_refused_unread(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(EVIL)
    for load in (model.load_tokenizer, model.load_pretrained, lambda it: model.load_trained(Path(it.base))):
        with pytest.raises(Refusal, match=r"weights as a pickle \(pytorch_model.bin\), .* in safetensors$"):
            load(base(folder))
    assert not (tmp_path / "executed").exists()


# Names

OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file elsewhere": lambda folder, secret: (folder / "notes.json").symlink_to(secret),
    "a link to a folder elsewhere": lambda folder, secret: (folder / "notes").symlink_to(secret.parent),
    "a pipe": lambda folder, _: os.mkfifo(folder / "notes.json"),
    "a device": lambda folder, _: (folder / "notes.json").symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", OUTSIDE.values(), ids=OUTSIDE)
def test_what_leads_out_of_a_folder_is_neither_read_nor_copied(
    folder: Path, tmp_path: Path, make: Callable[[Path, Path], object]
) -> None:
    secret = tmp_path / "secret" / "key"
    secret.parent.mkdir()
    secret.write_text("{}")
    make(folder, secret)
    for take in (files.sha256_of, foreign.check, lambda it: files.copy_folder(it, tmp_path / "copy")):
        with pytest.raises(Refusal, match=r"model/notes\S* is a link that leads elsewhere, or no file"):
            take(folder)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/../../x.safetensors", "missing.safetensors"]
)
def test_an_index_names_no_file_outside_its_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / foreign.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    with pytest.raises(Refusal, match=r"index.json names '.*', which is no weights file of that folder"):
        model.load_pretrained(base(folder))


# Sizes

HOSTILE: dict[str, Callable[[Path], object]] = {
    "header of 2**60 bytes": lambda it: weights(it, b"", length=2**60),
    "header longer than the file": lambda it: weights(it, b"{}", length=1000),
    "header of 100 MB": lambda it: weights(it, b'{"a":[' + b"[]," * 33_000_000 + b"[]]}"),
    "deep header": lambda it: weights(it, b'{"a":' * 500_000),
    "header that is no JSON": lambda it: weights(it, b"\xff" * 100),
    "overlapping tensors": lambda it: weights(
        it,
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        12,
    ),
    "shape of 2**60": lambda it: weights(it, HEADER % (2**60, 2**62), 4),
    "shape whose product overflows": lambda it: weights(
        it, HEADER.replace(b"%d]", b"4294967296,4294967296]", 1) % 4, 4
    ),
    "offsets beyond the file": lambda it: weights(it, HEADER % (2**28, 2**30), 4),
    "no byte": lambda it: (it / "model.safetensors").write_bytes(b""),
    "vocabulary of 2**40": lambda it: change(it / "config.json", vocab_size=2**40),
    "positions of 2**40": lambda it: change(it / "config.json", n_positions=2**40),
    "width of 2**30": lambda it: change(it / "config.json", n_embd=2**30),
    "a billion layers": lambda it: change(it / "config.json", n_layer=10**9),
    "heads of no number": lambda it: change(it / "config.json", n_head=float("nan")),
    "gigantic config": lambda it: hole(it / "config.json"),
    "gigantic tokenizer": lambda it: hole(it / "tokenizer.json"),
    "gigantic index": lambda it: hole(it / foreign.INDEX),
    "deep config": lambda it: (it / "config.json").write_bytes(b'{"a":' * 500_000),
    "deep tokenizer": lambda it: (it / "tokenizer.json").write_bytes(b'{"a":' * 500_000),
}
PEAK_KB = 250_000  # above what the libraries take before


def weights(folder: Path, header: bytes, num_bytes: int = 0, length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(num_bytes))


def hole(file: Path) -> None:
    with file.open("wb") as content:
        content.write(b'{"a": "')
        content.truncate(40 * 10**9)  # takes no room on the disk


LOAD = r"""
import json, re, sys, time
from pathlib import Path
import transformers
from pipeline import generate, stage
def peak_kb(): return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
sound, *folders = map(Path, sys.argv[1:])
generate.load(sound)
before = peak_kb()
for folder in folders:
    start_s = time.process_time()
    try:
        generate.load(folder)
        outcome = "loaded"
    except stage.Refusal as refusal:
        outcome = str(refusal)
    print(json.dumps([folder.name, outcome, time.process_time() - start_s, peak_kb() - before]))
"""


def test_hostile_weights_and_json_are_refused_before_room_is_made_for_them(sound: Path, tmp_path: Path) -> None:
    for name, make in HOSTILE.items():
        shutil.copytree(sound, tmp_path / name)
        make(tmp_path / name)
    command = [sys.executable, "-c", LOAD, str(sound), *(str(tmp_path / name) for name in HOSTILE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(HOSTILE)
    for name, outcome, seconds, more_kb in found:
        assert name in outcome and "\n" not in outcome and len(outcome) < 600, (name, outcome)
        assert seconds < 5, name
        assert more_kb < PEAK_KB, name


NASTY = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    1e400,
    "",
    "x",
    "\x1b[2J",
    "../../x",
    [],
    {},
    [[]],
    {"a": {"b": 1}},
    "a" * 9000,
]


@given(
    name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
    choices=st.lists(st.integers(0, 10**6), min_size=12, max_size=12),
    edits=st.one_of(st.just([]), EDITS),
)
@FUZZ
def test_any_damage_to_a_model_folder_is_refused_or_survived(
    sound: Path, name: str, choices: list[int], edits: Any
) -> None:
    folder = sound.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    file = folder / name
    if file.suffix == ".json" and not edits:
        file.write_text(json.dumps(with_something_nasty(json.loads(file.read_text()), iter(choices))))
    file.write_bytes(edited(file.read_bytes(), edits))
    for load in (load_and_encode, model.load_pretrained, lambda it: generate.load(Path(it.base))):
        with in_time(30):
            try:
                load(base(folder))
            except Refusal as refusal:
                assert "\n" not in str(refusal) and len(str(refusal)) < 700 and str(refusal).isprintable()


def load_and_encode(params: model.Params) -> None:
    tokenizer = model.load_tokenizer(params)
    tokenize.start_and_end(tokenizer, params.base)
    list(tokenize.encoded([(["some text € <|endoftext|>", "\0 x"], ["0" * 64] * 2)], tokenizer, tokenize.Tally()))


def with_something_nasty(content: Any, choices: Any) -> Any:
    """The content with one value, somewhere inside, exchanged."""
    if isinstance(content, dict) and content:
        key = sorted(content)[next(choices) % len(content)]
        return content | {key: with_something_nasty(content[key], choices)}
    if isinstance(content, list) and content:
        place = next(choices) % len(content)
        return [*content[:place], with_something_nasty(content[place], choices), *content[place + 1 :]]
    return NASTY[next(choices) % len(NASTY)]
