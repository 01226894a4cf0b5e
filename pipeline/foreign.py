"""Model folders that others may have made: looked through before anything in them is loaded or makes room for itself.

safetensors and transformers check much by themselves. What is here comes before them: pickles, which run code when
they are read; names that lead out of the folder; headers and JSON whose parsing alone would fill the memory; a
configuration that describes more weights than the files hold, for which transformers would make room and fill it with
random numbers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import files
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
MAX_TOKENIZER_BYTES = 2**26  # of tokenizer.json and vocab.json; the largest vocabularies in use take half of that
INDEX = "model.safetensors.index.json"  # says which file holds which weight, where there are several files


def check(folder: Path) -> None:
    """Look through a model folder; what it does not have is not missed.

    Raises:
        Refusal: it holds links that lead out of it, pickled weights and no others, or files that are not what they say.
    """
    found = files.listing(folder)
    weights = [file for file in found if file.suffix == ".safetensors"]
    pickles = [file.name for file in found if file.suffix in PICKLES]
    if pickles and not weights:
        raise Refusal(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read: "
            "take a copy of the model in safetensors"
        )
    for file in found:
        if file.suffix == ".json":
            limit = MAX_TOKENIZER_BYTES if file.name in ("tokenizer.json", "vocab.json") else files.MAX_JSON_BYTES
            if file.stat().st_size > limit:
                raise Refusal(f"{file} has {file.stat().st_size:,} bytes, more than any model needs there ({limit:,})")
    for file in weights:
        _check_header(file)
    if (folder / INDEX).exists():
        index = files.read_json(folder / INDEX, "weight_map")["weight_map"]
        named = set(map(str, index.values() if isinstance(index, dict) else [index]))
        missing = sorted(named - {file.name for file in weights if file.parent == folder})
        if missing:
            raise Refusal(f"{folder / INDEX} names {missing[0][:80]!r}, which is no weights file of that folder")


def _check_header(file: Path) -> None:
    """Refuse a safetensors file whose header is longer than any real one: parsing it takes 30 times its length."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
    if not 2 <= length <= min(files.MAX_JSON_BYTES, file.stat().st_size - 8):
        raise Refusal(f"{file} is no safetensors file: its header claims {length:,} bytes; fetch it again")


def check_size(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a configuration that describes more weights than the files of the folder hold.

    Raises:
        Refusal: it does, or a file of weights is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    num_tensors = num_held = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:  # reads the header; the weights stay on the disk
                for name in weights.keys():  # noqa: SIM118  # no dictionary
                    num_tensors += 1
                    num_held += math.prod(weights.get_slice(name).get_shape())
        except SafetensorError as problem:
            raise Refusal(f"{file} is no whole safetensors file ({problem}); fetch it again") from None
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > num_tensors:  # making the modules of a billion layers takes for ever
        raise Refusal(
            f"{folder / 'config.json'} describes {layers:,} layers, but the weights are {num_tensors:,} tensors"
        )
    with torch.device("meta"):  # shapes alone
        described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    num_described = sum(weight.numel() for weight in described.parameters())
    if num_described > num_held:
        raise Refusal(
            f"{folder / 'config.json'} describes {num_described:,} weights, but the files hold {num_held:,}; "
            "the others would be random"
        )
