"""What an executor measures, and the HTTP port where Prometheus reads it."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.utils import floatToGoString

from executor_service.config import ConfigError
from executor_service.cuda_graphs import CaptureReport, GraphUse
from executor_service.executor import EpochLink, PlanLauncher
from executor_service.step_output import StepOutput
from executor_service.step_plan import Fault, FaultCode, StepPlan, StepResult
from executor_service.wire import Capacity

_STATUS = Path("/proc/self/status")  # of Linux; getrusage would count what the parent had when it started us
_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class StepTotals:
    """What steps add up to: plain numbers, each with one thread that adds to it.

    A small step feels what a metric's lock costs.
    """

    def __init__(self) -> None:
        self.queued_us = 0
        self.device_us = 0
        self.starved_us = 0
        self.computed_tokens = 0
        self.sampled_tokens = 0
        self.bad_logits = 0
        self._counts = [0] * (len(_STEP_BUCKETS) + 1)

    def add(self, result: StepResult) -> None:
        """A step's result was sent."""
        timings = result.timings
        self._counts[bisect_left(_STEP_BUCKETS, timings.device_us / 1e6)] += 1
        self.queued_us += timings.queued_us
        self.device_us += timings.device_us
        self.starved_us += timings.starved_us
        self.sampled_tokens += len(result.token_ids)
        if len(result.row_status):
            self.bad_logits += int(result.row_status.sum())

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        bounds = [*map(floatToGoString, _STEP_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        for name, help_text, value in (
            ("steps", "Steps whose results were sent.", buckets[-1][1]),
            (
                "queued_seconds",
                "Time between plans' arrival and their launch, summed up over plans.",
                self.queued_us / 1e6,
            ),
            (
                "starved_seconds",
                "Time in which the device idled for lack of a plan although the scheduler had work.",
                self.starved_us / 1e6,
            ),
            ("computed_tokens", "Input tokens of the steps that were launched.", self.computed_tokens),
            ("sampled_tokens", "Tokens that were sent back.", self.sampled_tokens),
            ("bad_logits", "Sampled rows whose logits were not finite.", self.bad_logits),
        ):
            yield CounterMetricFamily(f"baton_executor_{name}", help_text, value=value)
        yield HistogramMetricFamily(
            "baton_executor_step_seconds", "Time that the device took for a step.", buckets, self.device_us / 1e6
        )


class ExecutorMetrics:
    """All metrics of this process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter tells nothing
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.steps = StepTotals()
        registry.register(self.steps)
        faults = Counter(
            "baton_executor_faults", "Faults, each of which ended a session.", ("code",), registry=registry
        )
        self.faults = {code: faults.labels(code.name.lower()) for code in FaultCode}
        self.sessions = Counter("baton_executor_sessions", "Sessions (epochs) that began.", registry=registry)

    def describe(self, capacity: Capacity, kv_bytes: int, graphs: CaptureReport | None = None) -> None:
        """Add what does not change once the model is loaded."""
        if graphs is not None:
            for name, help_text, value in (
                ("baton_executor_graphs", "Captured CUDA graphs.", graphs.graphs),
                ("baton_executor_graph_bytes", "Device memory of captured CUDA graphs.", graphs.memory),
                ("baton_executor_graph_capture_seconds", "Time that capturing CUDA graphs took.", graphs.seconds),
            ):
                Gauge(name, help_text, registry=self.registry).set(value)
            self.registry.register(_GraphSteps(graphs.use))
        if _STATUS.exists():
            Gauge(
                "baton_executor_peak_rss_bytes", "The most RAM that the process has taken.", registry=self.registry
            ).set_function(_peak_rss_bytes)
        Gauge("baton_executor_kv_cache_bytes", "Memory of the KV cache.", registry=self.registry).set(kv_bytes)
        Gauge("baton_executor_kv_blocks", "KV blocks.", registry=self.registry).set(capacity.num_blocks)
        Gauge(
            "baton_executor_info",
            "1; the labels describe the executor.",
            ("executor", "model", "device", "dtype", "block_size"),
            registry=self.registry,
        ).labels(capacity.executor_id, capacity.model, capacity.device, capacity.dtype, str(capacity.block_size)).set(1)

    def follow(self, is_connected: Callable[[], bool], dropped_frames: Callable[[], Mapping[str, int]]) -> None:
        """Add what the link knows; both are called from the threads of the HTTP port."""
        connected = Gauge(
            "baton_executor_connected", "Whether a session with a scheduler is open.", registry=self.registry
        )
        connected.set_function(is_connected)
        self.registry.register(_DroppedFrames(dropped_frames))


def _peak_rss_bytes() -> float:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return float(line.split()[1]) * 1024


class _DroppedFrames:
    """Counts that somebody else keeps."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        family = CounterMetricFamily(
            "baton_executor_dropped_frames", "Frames and plans that were ignored.", labels=("reason",)
        )
        for reason, count in self._counts().items():
            family.add_metric((reason,), count)
        yield family


class _GraphSteps:
    """Counts that the main thread keeps."""

    def __init__(self, use: GraphUse) -> None:
        self._use = use

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        family = CounterMetricFamily(
            "baton_executor_graph_steps", "Steps, by whether a captured graph covered them.", labels=("run",)
        )
        family.add_metric(("replayed",), self._use.replayed)
        family.add_metric(("eager",), self._use.eager)
        yield family


class MeteredLink:
    """A link whose results, faults and sessions are counted on their way."""

    def __init__(self, link: EpochLink, metrics: ExecutorMetrics) -> None:
        self._link = link
        self._metrics = metrics

    def ready(self, epoch: int) -> None:
        """See EpochLink."""
        self._metrics.sessions.inc()
        self._link.ready(epoch)

    def result(self, epoch: int, result: StepResult) -> None:
        """See ResultSink; the result goes first, the scheduler waits for it."""
        self._link.result(epoch, result)
        self._metrics.steps.add(result)

    def fault(self, epoch: int, fault: Fault) -> None:
        """See ResultSink."""
        self._metrics.faults[fault.code].inc()
        self._link.fault(epoch, fault)


class MeteredLauncher:
    """A launcher whose tokens are counted."""

    def __init__(self, launcher: PlanLauncher, metrics: ExecutorMetrics) -> None:
        self._launcher = launcher
        self._metrics = metrics

    def reset(self) -> None:
        """See PlanLauncher."""
        self._launcher.reset()

    def launch(self, plan: StepPlan) -> StepOutput:
        """See PlanLauncher."""
        output = self._launcher.launch(plan)
        self._metrics.steps.computed_tokens += plan.slot_mapping.size
        return output


def serve_metrics(metrics: ExecutorMetrics, host: str, port: int) -> None:
    """Serve the metrics from daemon threads until the process ends.

    Raises:
        ConfigError: the port cannot be bound.
    """
    try:
        start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise ConfigError(f"--metrics-port: cannot listen on {host}:{port}: {error.strerror}") from error
