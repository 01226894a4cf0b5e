"""How fast a training is, and what the machine does meanwhile: leaves that no result depends on.

    .runs/<fingerprint>/timing.jsonl     tokens per second; training writes it
    .runs/<fingerprint>/machine.jsonl    processor, memory, disk, network, GPUs; pipeline/follow.py writes it

MLflow's page of a run shows the latter as "System metrics". They are files so that a store that was out of reach while
training ran gets them when its result is published.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipeline.tail import Tail
from pipeline.tracking import CURVE, SYSTEM, Points, uri

SPEEDS, MEASURED = "timing.jsonl", "machine.jsonl"
SPEED = "tokens_per_s"  # of a row of the former
INTERVAL_S = 10.0


class Machine:
    """Measures by MLflow's own monitors."""

    def __init__(self, folder: Path) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._file = folder / MEASURED
        self._monitor = SystemMetricsMonitor("", tracking_uri=uri())  # never started: it only measures
        self._monitor.collect_metrics()  # the share of the processor is that since the last time
        self._measured_s = time.monotonic()

    def measure(self, step: int) -> None:
        """Write a row for this step, if the last one was written long enough ago and its folder is still there."""
        if time.monotonic() - self._measured_s < INTERVAL_S or not self._file.parent.exists():
            return
        self._measured_s = time.monotonic()
        for one in self._monitor.monitors:
            one.clear_metrics()
        self._monitor.collect_metrics()
        row = {"step": step, "time_ms": time.time_ns() // 10**6, "metrics": self._monitor.aggregate_metrics()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")


class Beside:
    """Reads both files as they grow."""

    def __init__(self, folder: Path) -> None:
        self._speeds, self._measured = Tail(folder / SPEEDS, appended=True), Tail(folder / MEASURED, appended=True)
        self.times_ms: dict[int, int] = {}  # step -> when the machine was measured, since 1970

    def new_points(self) -> Points:
        """What they got since the last look; of a step that two attempts did, what the first one did."""
        points: Points = {}
        for row in self._speeds.new_rows():
            points.setdefault((CURVE + SPEED, row["step"]), float(row[SPEED]))
        for row in self._measured.new_rows():
            self.times_ms.setdefault(row["step"], row["time_ms"])
            for name, value in row["metrics"].items():
                points.setdefault((SYSTEM + name, row["step"]), float(value))
        return points
