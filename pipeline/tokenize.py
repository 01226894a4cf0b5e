"""Tokenize: documents become token ids, by the base model's tokenizer or one trained on the training side.

In:  data/clean/documents.parquet (text, sha256)
Out: data/tokens/ (pipeline/corpus.py describes its files), reports/tokenize.json

    python -m pipeline.tokenize

Text never becomes control tokens: `<|endoftext|>` in a document is thirteen ordinary characters. Our own
tokenizer gives every document back exactly; each one is checked. A pretrained tokenizer may not, if it
lower-cases or normalises: such documents are kept, because that is how the model was trained, and counted as
documents_not_reversible. Bits per byte always count the bytes of the text itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pydantic
from tqdm import tqdm

from pipeline import bpe, documents, files, stage
from pipeline.model import Params as ModelParams
from pipeline.model import load_tokenizer
from pipeline.sides import TRAIN, side_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.split import Params as SplitParams

REASONS = ("empty", "control_token")


class Params(stage.Params):
    """Section `tokenize` of params.yaml."""

    vocabulary_size: int = pydantic.Field(ge=bpe.SMALLEST_VOCABULARY, le=2**20)
    min_frequency: int = pydantic.Field(ge=1)


@dataclass
class Tally:
    """What the documents became."""

    documents_in: int = 0
    documents_kept: int = 0
    documents_dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    documents_not_reversible: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Encoded:
    """One document as it is stored."""

    tokens: list[int]
    num_bytes: int
    content_hash: int


def content_hash(sha256: str) -> int:
    """The first 8 bytes of a SHA-256, big-endian, as a number."""
    return int(sha256[:16], 16)


def training_texts(file: Path, params: SplitParams) -> Iterator[list[str]]:
    """The texts of the training side alone, in batches: the tokenizer must not have seen the others."""
    for texts, sha256s in documents.read(file, "text", "sha256"):
        sides = side_of(np.array([content_hash(sha256) for sha256 in sha256s], np.uint64), params)
        yield [text for text, side in zip(texts, sides, strict=True) if side == TRAIN]


def start_and_end(tokenizer: PreTrainedTokenizerBase, base: str) -> tuple[int, int]:
    """The control tokens before and after a document: BOS (EOS where there is none) and EOS.

    Raises:
        Refusal: the tokenizer has no end-of-sequence token, so no model of its could ever stop.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise stage.Refusal(
            f"the tokenizer of model.base {base} has no eos_token: name one of its tokens in its tokenizer_config.json "
            '(for GPT-2: "eos_token": "<|endoftext|>"), or choose another model'
        )
    start = tokenizer.bos_token_id
    return (end if start is None else start), end


def encoded(
    batches: Iterable[tuple[list[str], ...]], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> Iterator[Encoded]:
    """Encode batches of (texts, sha256s) in order, without control tokens, counting everything in `tally`."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # that is: as the text that they are
    control = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    # What a tokenizer writes for characters that it does not know is no control token, unless it ends documents too.
    control -= {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for texts, sha256s in batches:
        with stage.refused_as(_cannot_encode):
            ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            decoded = backend.decode_batch(ids, skip_special_tokens=False)
        for text, sha256, tokens, back in zip(texts, sha256s, ids, decoded, strict=True):
            tally.documents_in += 1
            if not tokens:
                tally.documents_dropped["empty"] += 1
            elif not control.isdisjoint(tokens):
                tally.documents_dropped["control_token"] += 1
            else:
                document = Encoded(tokens, len(text.encode()), content_hash(sha256))
                tally.documents_kept += 1
                tally.documents_not_reversible += back != text
                tally.num_tokens += len(tokens)
                tally.num_bytes += document.num_bytes
                yield document


def _cannot_encode(problem: BaseException) -> stage.Refusal:
    return stage.Refusal(
        f"the tokenizer of model.base fails at this text ({stage.reason(problem)}); take another model"
    )


def write_arrays(folder: Path, rows: Iterable[Encoded], vocabulary_size: int) -> None:
    """Write the arrays of pipeline/corpus.py as the documents come: 24 bytes of memory for each."""
    dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
    ends, sizes, hashes = array("q", [0]), array("q"), array("Q")
    with (folder / "tokens.bin").open("wb") as flat:
        for row in rows:
            flat.write(np.array(row.tokens, dtype).tobytes())
            ends.append(ends[-1] + len(row.tokens))
            sizes.append(row.num_bytes)
            hashes.append(row.content_hash)
    np.save(folder / "offsets.npy", np.array(ends, "<i8"), allow_pickle=False)
    np.save(folder / "num_bytes.npy", np.array(sizes, "<i8"), allow_pickle=False)
    np.save(folder / "hashes.npy", np.array(hashes, "<u8"), allow_pickle=False)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's folder, without what transformers notes about where it was loaded from."""
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def main(paths: stage.Paths, model: ModelParams, split: SplitParams, tokenize: Params) -> None:
    """Encode data/clean into data/tokens, and write the counts."""
    source = paths["clean"] / "documents.parquet"
    if model.from_scratch:
        texts = training_texts(source, split)
        tokenizer = bpe.train(texts, tokenize.vocabulary_size, tokenize.min_frequency)
    else:
        tokenizer = load_tokenizer(model)
    start_id, end_id = start_and_end(tokenizer, model.base)
    vocabulary_size = max(tokenizer.get_vocab().values()) + 1
    tally = Tally()
    with files.whole_folder(paths["tokens"]) as folder:
        rows = encoded(documents.read(source, "text", "sha256"), tokenizer, tally)
        progress = tqdm(rows, total=documents.count(source), desc="tokenize", unit=" documents", disable=None)
        write_arrays(folder, progress, vocabulary_size)
        if not tally.num_tokens:
            raise stage.Refusal(
                f"the tokenizer of model.base {model.base} made no token of {tally.documents_in:,} documents"
            )
        assert not (model.from_scratch and tally.documents_not_reversible), "a byte-level BPE loses nothing"
        about = {"vocabulary_size": vocabulary_size, "start_id": start_id, "end_id": end_id}
        files.write_json(folder / "tokens.json", about)
        save_tokenizer(tokenizer, folder / "tokenizer")
    bytes_per_token = round(tally.num_bytes / tally.num_tokens, 4)
    report = vars(tally) | {"vocabulary_size": vocabulary_size, "bytes_per_token": bytes_per_token}
    files.write_json(paths["tokenize.json"], report)
    print(
        f"tokenize: {tally.num_tokens:,} tokens of {tally.documents_kept:,} documents, "
        f"{bytes_per_token:.2f} bytes a token, vocabulary {vocabulary_size:,}"
    )
    lost = sum(tally.documents_dropped.values())
    if lost or tally.documents_not_reversible:
        print(
            f"tokenize: the tokenizer of {model.base} cannot hold {lost:,} documents (dropped), and gives back "
            f"{tally.documents_not_reversible:,} changed (kept); reports/tokenize.json has the reasons"
        )


if __name__ == "__main__":
    stage.run("tokenize", main)
