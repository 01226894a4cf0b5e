"""Which exact attention is faster on a CPU at which shape: ours in blocks, or torch's fused kernel?

    python -m bench.attention

Forwards and backwards, in turns, in bf16 with the mask of packed documents; milliseconds, median. With dropout the
comparison is unequal in torch's favour: it draws its mask from a generator with a state, which no resumed run repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pipeline import launcher

SHAPES = {  # windows, heads, tokens, head size
    "the demo": (16, 4, 128, 48),
    "GPT-2 124M, 4 x 256": (4, 12, 256, 64),
    "GPT-2 124M, 4 x 512": (4, 12, 512, 64),
    "GPT-2 124M, 1 x 1,024": (1, 12, 1024, 64),
}
NUM_ROUNDS, NUM_WARMUPS = 15, 3


def compare(shape: tuple[int, int, int, int], dropout: float) -> tuple[float, float]:
    """Medians of both, in milliseconds."""
    import torch
    from torch.nn import functional as F

    from pipeline.attention import attend
    from pipeline.dropout import Noise

    torch.manual_seed(0)
    B, _, T, _ = shape
    leaves = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape, dtype=torch.bfloat16)
    document_BT = (torch.arange(T) // (T // 2)).expand(B, T)
    same_B1TT = (document_BT[:, None, :, None] == document_BT[:, None, None, :]) & torch.ones(T, T).bool().tril()
    noise = Noise()
    noise.begin(list(range(B)), 1, 1)
    layer: Any = SimpleNamespace(noise=noise)

    def ours() -> torch.Tensor:
        return attend(layer, *leaves, same_B1TT, dropout)[0].transpose(1, 2)

    def fused() -> torch.Tensor:
        return F.scaled_dot_product_attention(*leaves, attn_mask=same_B1TT, dropout_p=dropout)

    def timed_ms(run: Callable[[], torch.Tensor]) -> float:
        for leaf in leaves:
            leaf.grad = None
        began = time.perf_counter()
        run().backward(grad)  # type: ignore[no-untyped-call]
        return 1000 * (time.perf_counter() - began)

    rounds = [(timed_ms(ours), timed_ms(fused)) for _ in range(NUM_ROUNDS)]
    in_blocks, by_torch = zip(*rounds[NUM_WARMUPS:], strict=True)
    return statistics.median(in_blocks), statistics.median(by_torch)


def main() -> None:
    """Print the table."""
    launcher.settle()
    print("| shape | dropout | in blocks | fused |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dropout in (0.0, 0.1):
            in_blocks, fused = compare(shape, dropout)
            print(f"| {name} | {dropout} | {in_blocks:.1f} | {fused:.1f} |", flush=True)


if __name__ == "__main__":
    main()
