"""What the machine does while a training runs on it: MLflow's page of a run shows it as "System metrics"."""

from __future__ import annotations

import time

from pipeline.tracking import SYSTEM, Points, uri

INTERVAL_S = 10.0


class Machine:
    """What the machine does, measured by MLflow's own monitors: processor, memory, disk, network, GPUs if there are."""

    def __init__(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor("", tracking_uri=uri())  # never started: it only measures
        self._monitor.collect_metrics()  # the share of the processor is that since the last time
        self._measured_s = time.monotonic()

    def points(self, step: int) -> Points:
        """The points of this step, if the last ones were taken long enough ago."""
        if time.monotonic() - self._measured_s < INTERVAL_S:
            return {}
        self._measured_s = time.monotonic()
        for one in self._monitor.monitors:
            one.clear_metrics()
        self._monitor.collect_metrics()
        return {(SYSTEM + name, step): value for name, value in self._monitor.aggregate_metrics().items()}
