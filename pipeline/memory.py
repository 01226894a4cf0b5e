"""Will it fit? The peak memory of training, predicted before anything is allocated.

    python -m pipeline.memory                  # a table: model by windows a forward pass, on a GPU and on a CPU
    python -m pipeline.memory --length 1024

`train` asks here before it starts: a machine that is too small is told so in one sentence, instead of killing the
process hours later without a word. With `train.micro_batch_size: auto` it takes what fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GPT2Config, PreTrainedConfig

from pipeline import device, model, room, stage
from pipeline.footprint import Footprint, Rehearsal
from pipeline.stage import Refusal
from pipeline.train import Params

SIZES = (1, 2, 4, 8, 16)  # columns of the table
DIGITS = {"bf16": 16, "none": 32}
FAMILY = {  # layers, heads, width of the models on the Hub; all have 50,257 tokens and 1,024 positions
    "distilgpt2": (6, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def available(place: device.Place) -> dict[str, int]:
    """Bytes that this process can come to, by where they lie, as in `Footprint.peak`."""
    host = {"host": room.on_host()}
    return host | {"gpu": room.on_gpu(place.device)} if place.device.type == "cuda" else host


def fitting(place: device.Place, config: PreTrainedConfig, params: Params) -> int:
    """Windows a forward pass: as many as params.yaml says; with `auto` fewer where so many do not fit.

    Raises:
        Refusal: what params.yaml says does not fit, with what would.
    """
    kind, found = place.device.type, available(place)
    rehearsal = Rehearsal(config, params, device.DTYPES[place.precision], kind)

    def fits(size: int, length: int = params.max_length) -> bool:
        takes = rehearsal.footprint(size, length).peak(kind)
        return all(takes[where] <= found[where] for where in takes)

    wanted = params.windows_at_once(place.world_size)
    if fits(wanted):
        return wanted
    largest = _largest(fits, wanted)
    if params.micro_batch_size == "auto" and largest:
        return -(-wanted // -(-wanted // largest))  # passes of about the same size
    if largest:
        size, advice = wanted, f"at most {largest} fit: set train.micro_batch_size to {largest}, or to auto"
        advice += "; train.batch_size may stay, for no loss depends on it"
    elif length := next((half for half in _halves(params.max_length) if fits(1, half)), 0):
        size, advice = 1, f"train.max_length: {length} would fit"
    else:
        # At one token a window nearly all is in proportion to the weights.
        least = rehearsal.footprint(1, 1)
        share = min((found[at] - least.process) / (take - least.process) for at, take in least.peak(kind).items())
        size, weights = 1, rehearsal.num_parameters / 1e6
        advice = (
            f"free memory, or choose a model of at most {max(0.0, share) * weights:,.0f} million weights "
            f"instead of {weights:,.0f}"
        )
    raise Refusal(f"{_sentence(rehearsal.footprint(size, params.max_length), kind, found, size, params)}; {advice}")


def _largest(fits: Callable[[int], bool], wanted: int) -> int:
    """The largest size below one that does not fit; 0: none."""
    low, high = 0, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _halves(length: int) -> Iterator[int]:
    """Half, a quarter, and so on, as long as a window says something."""
    while (length := length // 2) >= 16:
        yield length


def _sentence(footprint: Footprint, kind: str, found: dict[str, int], size: int, params: Params) -> str:
    """What does not fit, with its parts."""
    peak = footprint.peak(kind)
    where = next(name for name in peak if peak[name] > found[name])
    parts = {}
    if where == "gpu" or "gpu" not in peak:
        parts["weights, gradients and optimizer"] = footprint.state
        parts["activations and logits"] = footprint.work
    if where == "host":
        parts["the copy that is written to disk"] = footprint.copy
        parts["the process"] = footprint.process
        parts["gaps between blocks"] = footprint.gaps
    listed = ", ".join(f"{_gb(num_bytes)} for {name}" for name, num_bytes in parts.items() if num_bytes)
    return (
        f"training with {size} {'window' if size == 1 else 'windows'} of {params.max_length} tokens a forward pass "
        f"takes about {_gb(peak[where])} GB of {'GPU ' if where == 'gpu' else ''}memory ({listed}), "
        f"but {_gb(found[where])} GB are available"
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}"


def rows(max_length: int, params: Params, own: PreTrainedConfig | None) -> Iterator[str]:
    """The table, a line each."""
    cpu, gpu = device.choose("cpu"), torch.device("cuda")
    places = {"gpu": device.Place(gpu, "bf16"), "host": device.Place(cpu, device.choose_precision("auto", cpu))}
    found = available(places["gpu"] if torch.cuda.is_available() else places["host"])
    heads = ["GPU, 16 bits", f"CPU, {DIGITS[places['host'].precision]} bits"]
    yield f"{'':24}" + "".join(f"{head:^{7 * len(SIZES) + 3}}" for head in heads).rstrip()
    yield f"{'model':14}{'weights':>10}" + "".join("   " + "".join(f"{size:>7}" for size in SIZES) for _ in heads)
    for name, config in _configs(own, params):
        length = min(max_length, model.num_positions(config))
        line = ""
        for where, place in places.items():
            rehearsal = Rehearsal(config, params, device.DTYPES[place.precision], place.device.type)
            line += "   "
            for size in SIZES:
                takes = rehearsal.footprint(size, length).peak(place.device.type)
                fits = all(take <= found.get(at, 0) for at, take in takes.items())
                line += f"{_gb(takes[where]) + ('*' if fits else ' '):>7}"
        yield f"{name:14}{rehearsal.num_parameters / 1e6:>9.1f}M{line}"


def _configs(own: PreTrainedConfig | None, params: Params) -> Iterator[tuple[str, PreTrainedConfig]]:
    if own is not None:
        yield "params.yaml", own
    for name, (num_layers, num_heads, width) in FAMILY.items():
        dropouts = {key: params.dropout for key in ("embd_pdrop", "resid_pdrop", "attn_pdrop")}
        yield name, GPT2Config(n_layer=num_layers, n_head=num_heads, n_embd=width, **dropouts)


def main() -> None:
    """Print the table for the models that can be named in params.yaml."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, help="tokens a window; by default train.max_length of params.yaml")
    arguments = parser.parse_args()
    with stage.refusals("memory"):
        sections = stage.load_params()
        train: Params = sections["train"]
        length = arguments.length or train.max_length
        print(
            f"GB of memory at the peak of training with {length} tokens a window and dropout {train.dropout:g},\n"
            "by windows a forward pass (train.micro_batch_size). * fits into what is free here\n"
        )
        for line in rows(length, train, _own_config(sections)):
            print(line, flush=True)


def _own_config(sections: dict[str, Any]) -> PreTrainedConfig | None:
    """The model of params.yaml; None where it is pretrained and cannot be reached."""
    vocabulary_size = sections["tokenize"].vocabulary_size if sections["model"].from_scratch else 0
    try:
        return model.initial_config(sections["model"], sections["train"], vocabulary_size, 0, 0)
    except Refusal as problem:
        print(f"{problem}\n")
        return None


if __name__ == "__main__":
    main()
