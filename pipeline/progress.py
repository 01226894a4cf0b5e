"""What a person sees while training runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from pipeline.loop import Step

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_SPEEDS = 2.0


class Progress:
    """Loss, learning rate, tokens per second and time left.

    Speeds also go to `timing.jsonl` in the run's folder: a leaf that no result depends on.
    """

    def __init__(self, folder: Path, first: int, num_steps: int, num_tokens: int) -> None:
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first, desc="train", unit="step", disable=not on_terminal)
        self._timing = (folder / "timing.jsonl").open("a", encoding="utf-8")
        self._lines = not on_terminal
        self._first, self._num_steps = first, num_steps
        self._busy_s = 0.0  # time spent on steps, without evaluations
        self._began = self._line_at = time.monotonic()
        self._speed_since = (0.0, num_tokens)
        self._speed = 0.0

    def advance(self, done: Step) -> None:
        """Show a step that was just done."""
        step, num_tokens = done.step, done.num_tokens
        loss = "skipped" if done.loss is None else f"loss {done.loss:.3f}"
        now = time.monotonic()
        busy_s = self._busy_s + now - self._began
        since_s, since_tokens = self._speed_since
        if busy_s - since_s >= SECONDS_BETWEEN_SPEEDS or not self._speed:
            self._speed = (num_tokens - since_tokens) / max(busy_s - since_s, 1e-9)
            self._speed_since = (busy_s, num_tokens)
            self._timing.write(json.dumps({"step": step, "tokens_per_s": round(self._speed, 1)}) + "\n")
            self._timing.flush()
        self._bar.set_postfix_str(f"{loss}, lr {done.learning_rate:.1e}, {self._speed:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._lines and now - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = now
            left_s = busy_s / (step - self._first) * (self._num_steps - step)
            self.say(
                f"step {step}/{self._num_steps}  {loss}  lr {done.learning_rate:.1e}  "
                f"{self._speed:,.0f} tokens/s  {left_s / 60:.0f} min {left_s % 60:.0f} s left"
            )

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        self._bar.clear()
        print(line, flush=True)
        self._bar.refresh()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        self._busy_s += time.monotonic() - self._began
        yield
        self._began = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
        self._timing.close()
