"""The engine's status as metrics, under our names and under those that gateways and autoscalers know from vLLM."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from scheduler_service.engine.api_wire import ExecutorStatus, Status


@dataclass(frozen=True, slots=True)
class _Executors:
    """One metric of every executor that takes plans. Counters begin anew when an executor joins again."""

    family: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    help: str
    value: Callable[[ExecutorStatus], float]


_EXECUTOR_METRICS = (
    _Executors(
        GaugeMetricFamily,
        "baton_requests_waiting",
        "Requests handed to the executor that do not run yet, preempted ones included.",
        lambda one: one.waiting_requests,
    ),
    _Executors(
        GaugeMetricFamily,
        "baton_requests_running",
        "Requests that hold a row of the executor.",
        lambda one: one.running_requests,
    ),
    _Executors(
        GaugeMetricFamily, "baton_rows", "Requests that the executor can run at a time.", lambda one: one.max_rows
    ),
    _Executors(
        GaugeMetricFamily,
        "baton_kv_cache_usage_ratio",
        "Share of the executor's KV blocks that requests own, 0 to 1; cached blocks without an owner count as free.",
        lambda one: one.used_blocks / one.total_blocks,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_prefix_cache_query_tokens",
        "Tokens of admitted requests that were looked up in the prefix cache.",
        lambda one: one.prefix_query_tokens,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_prefix_cache_hit_tokens",
        "Tokens of admitted requests whose KV came from the prefix cache.",
        lambda one: one.prefix_hit_tokens,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_preemptions",
        "Running requests that lost their row and blocks for want of memory.",
        lambda one: one.preemptions,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_handovers",
        "Running requests that left for another executor, to even out the load or because this one was told to leave.",
        lambda one: one.handovers,
    ),
    _Executors(
        GaugeMetricFamily,
        "baton_run_ahead_steps",
        "Plans that may be unacknowledged: the current depth of run-ahead.",
        lambda one: one.run_ahead,
    ),
    _Executors(
        GaugeMetricFamily,
        "baton_inflight_steps",
        "Plans sent to the executor and not yet settled.",
        lambda one: one.inflight_steps,
    ),
    _Executors(CounterMetricFamily, "baton_steps", "Plans sent to the executor.", lambda one: one.steps),
    _Executors(
        CounterMetricFamily,
        "baton_device_seconds",
        "Time in which the executor's device computed, as the executor reports it.",
        lambda one: one.device_us / 1e6,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_starved_seconds",
        "Time in which the executor's device idled for lack of a plan although there was work.",
        lambda one: one.starved_us / 1e6,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_stale_tokens",
        "Tokens sampled for requests that had ended meanwhile: the price of running ahead.",
        lambda one: one.stale_tokens,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_failover_audited_tokens",
        "Tokens that the executor sampled again when streams went on there, to compare them with what had been sent.",
        lambda one: one.audited_tokens,
    ),
    _Executors(
        CounterMetricFamily,
        "baton_failover_replay_mismatch",
        "Audited tokens that differ from what had been sent: those streams do not go on exactly.",
        lambda one: one.audit_mismatches,
    ),
)


class EngineCollector:
    """Asks when it is scraped. Without an answer there is nothing but ``baton_engine_up`` 0: no number is made up."""

    def __init__(self, ask: Callable[[], Status | None], model: str) -> None:
        """Create a collector.

        Args:
            ask: the engine's status; None when it does not answer.
            model: the name under which the model is served.
        """
        self._ask = ask
        self._model = model

    def collect(self) -> Iterable[Metric]:
        """All families, for prometheus_client."""
        status = self._ask()
        yield GaugeMetricFamily(
            "baton_engine_up", "Whether the engine process answered this scrape.", value=int(status is not None)
        )
        if status is not None:
            yield from _cluster(status)
            yield from _executors(status.executors)
            yield from _aliases(status, self._model)


def _cluster(status: Status) -> Iterator[Metric]:
    yield GaugeMetricFamily("baton_executors_ready", "Executors that take plans.", value=len(status.executors))
    yield GaugeMetricFamily(
        "baton_requests_queued", "Requests in the front queue, not yet handed to any executor.", status.queued_requests
    )
    yield GaugeMetricFamily(
        "baton_oldest_queued_request_seconds",
        "Time that the request which has waited longest has been in the front queue; 0 = nobody waits.",
        status.oldest_queued_us / 1e6,
    )
    yield _reasons("baton_executor_losses", "Executors lost while they took plans.", status.executor_losses)
    yield _reasons("baton_dropped_frames", "Frames from executors that were ignored.", status.dropped_frames)


def _reasons(name: str, documentation: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=("reason",))
    for reason, count in counts.items():
        family.add_metric((reason,), count)
    return family


def _executors(executors: Sequence[ExecutorStatus]) -> Iterator[Metric]:
    for metric in _EXECUTOR_METRICS:
        family = metric.family(metric.name, metric.help, labels=("executor",))
        for executor in executors:
            family.add_metric((executor.executor_id,), metric.value(executor))
        yield family
    blocks = GaugeMetricFamily(
        "baton_kv_blocks",
        "KV blocks by state: used = owned by requests, cached = no owner but can still be hit, free = neither.",
        labels=("executor", "state"),
    )
    for one in executors:
        for state, count in (("used", one.used_blocks), ("cached", one.cached_blocks), ("free", one.free_blocks)):
            blocks.add_metric((one.executor_id, state), count)
    yield blocks


def _aliases(status: Status, model: str) -> Iterator[Metric]:
    """What the Gateway API Inference Extension and common KEDA and HPA recipes read."""
    executors = status.executors
    total = sum(one.total_blocks for one in executors)
    values = (
        (
            "vllm:num_requests_waiting",
            "Alias: requests that wait, in the front queue and on executors.",
            status.queued_requests + sum(one.waiting_requests for one in executors),
        ),
        (
            "vllm:num_requests_running",
            "Alias: requests that run, over all executors.",
            sum(one.running_requests for one in executors),
        ),
        (
            "vllm:kv_cache_usage_perc",
            "Alias: share of all executors' KV blocks in use, 0 to 1; 1 while there is no executor: nothing is free.",
            sum(one.used_blocks for one in executors) / total if total else 1.0,
        ),
    )
    for name, documentation, value in values:
        family = GaugeMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((model,), value)
        yield family
    yield _cache_config(executors)


def _cache_config(executors: Sequence[ExecutorStatus]) -> Metric:
    """One series for the whole cluster; where block sizes differ, capacity is expressed in the smallest."""
    family = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Alias: 1; the labels are the KV blocks of all executors together.",
        labels=("block_size", "num_gpu_blocks"),
    )
    if executors:
        size = min(one.block_size for one in executors)
        tokens = sum(one.total_blocks * one.block_size for one in executors)
        family.add_metric((str(size), str(tokens // size)), 1)
    return family
