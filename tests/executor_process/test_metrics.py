"""What steps add up to reads as if prometheus_client's own metrics had counted it."""

from collections.abc import Iterable

import numpy as np
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric

from executor_service.metrics import ExecutorMetrics, MeteredLink
from executor_service.step_plan import Fault, StepResult, StepTimings

_NAME = "baton_executor_step_seconds"


class _Link:
    def ready(self, epoch: int) -> None: ...
    def result(self, epoch: int, result: StepResult) -> None: ...
    def fault(self, epoch: int, fault: Fault) -> None: ...


def _result(device_us: int, *status: int) -> StepResult:
    timings = StepTimings(queued_us=10, device_us=device_us, starved_us=5)
    return StepResult(1, np.zeros(3, np.int32), np.array(status, np.uint8), timings)


def _samples(metrics: Iterable[Metric]) -> list[tuple[str, dict[str, str], float]]:
    return [(one.name, one.labels, one.value) for metric in metrics for one in metric.samples]


def test_histogram_of_steps() -> None:
    metrics, durations = ExecutorMetrics(), (500, 1_000, 1_001, 20_000, 10_000_000, 20_000_000)
    link = MeteredLink(_Link(), metrics)
    for duration in durations:
        link.result(1, _result(duration))
    ours = [metric for metric in metrics.registry.collect() if metric.name == _NAME]
    buckets = [float(sample[1]["le"]) for sample in _samples(ours) if "le" in sample[1]]
    registry = CollectorRegistry()
    theirs = Histogram(_NAME, "The same.", registry=registry, buckets=buckets)
    for duration in durations:
        theirs.observe(duration / 1e6)
    assert _samples(ours) == _samples(registry.collect())


def test_sums() -> None:
    metrics = ExecutorMetrics()
    link = MeteredLink(_Link(), metrics)
    for result in (_result(100), _result(100, 0, 1, 1)):
        link.result(1, result)
    expected = {"steps": 2, "queued_seconds": 2e-5, "starved_seconds": 1e-5, "sampled_tokens": 6, "bad_logits": 2}
    for name, value in expected.items():
        assert metrics.registry.get_sample_value(f"baton_executor_{name}_total") == value
