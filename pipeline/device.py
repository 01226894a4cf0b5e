"""Where to compute, in which precision, with how many processes; the numeric class that fixes a result's bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from pipeline.stage import Refusal

if TYPE_CHECKING:
    from pipeline.train import Params

Precision = Literal["bf16", "fp16", "none"]


@dataclass(frozen=True)
class Place:
    """Where this process computes, in which precision, and which of several processes it is."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0


@contextlib.contextmanager
def join_processes(params: Params) -> Iterator[Place]:
    """Choose device and precision; under torchrun, join the other processes."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = choose(params.device)
    if world_size > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    place = Place(device, choose_precision(params.mixed_precision, device), rank, world_size)
    if world_size == 1:
        yield place
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()


def sum_over_processes(*tensors: torch.Tensor) -> None:
    """Sum each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def any_process(here: bool) -> bool:
    """Whether it is so in any of the processes."""
    count = torch.tensor(int(here))
    sum_over_processes(count)
    return bool(count)


def wait_for_processes() -> None:
    """Go on when every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def choose(name: str) -> torch.device:
    """The device of that name; `auto` takes the first of cuda, mps and cpu that is there.

    Raises:
        Refusal: there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        num_present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= num_present.get(device.type, 0):
            raise RuntimeError(f"this machine has {num_present.get(device.type, 0)} of kind {device.type}")
    except RuntimeError as problem:
        raise Refusal(f"train.device is {name!r}: {str(problem).splitlines()[0]}; use auto or cpu") from None
    return device


def make_deterministic() -> None:
    """Only algorithms that give the same bytes every time; there is no other mode."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(True)
    # With those torch also writes NaN into all memory that it gets anew, to show who reads before writing. Nobody here
    # does, as equal bytes prove, and in small steps it takes time (python -m bench.promises).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of matrix products; `auto` takes bf16 where the hardware computes in it.

    Raises:
        Refusal: fp16 on a device without a loss scaler for it.
    """
    if name == "auto":
        return "bf16" if _computes_bf16(device) else "fp16" if device.type == "cuda" else "none"
    if name == "fp16" and device.type != "cuda":
        raise Refusal(f"train.mixed_precision is fp16, which needs a GPU, but the device is {device}; use bf16 or none")
    assert name in ("bf16", "fp16", "none")
    return name  # type: ignore[return-value]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}  # that the model computes in


def numeric_class(device: torch.device, precision: Precision, world_size: int) -> dict[str, Any]:
    """All that decides the bytes of a result besides parameters, data and code."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        matrix_units = "+".join(["amx"] * _has_amx() + ["bf16"] * _has_avx512_bf16())
        hardware = f"{torch.backends.cpu.get_cpu_capability()} {matrix_units}".strip()
    return {
        "device": device.type,
        "hardware": hardware,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "libraries": {name: version(name) for name in ("numpy", "safetensors", "torch", "transformers")},
    }


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (_has_amx() or _has_avx512_bf16())


def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _has_avx512_bf16() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
