"""Pictures of runs; needs matplotlib."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from baton.bench.records import CUT_OFF, OK, ClosedLoop, Record, RunResult, load_value
from baton.bench.slo import Slo
from baton.bench.summary import Latency, Summary, end_to_end, time_to_first_token, token_gaps
from baton.errors import BatonError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    FloatArray: TypeAlias = NDArray[np.float64]

_BINS = 60
_DPI = 150
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f6fb4", "#e07b16", "#2a9d5c", "#c8322b", "#888888"
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def require_matplotlib() -> None:
    """Raises BatonError, with what to do, when it is not installed; call it before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise BatonError("--plot needs matplotlib: pip install 'baton[bench]'") from error


def plot_run(path: Path, title: str, result: RunResult, slo: Slo) -> None:
    """Draws one run over time: first tokens, gaps between tokens, throughput and requests in flight.

    Raises:
        BatonError: the file's suffix names no format that matplotlib knows.
        OSError: the file cannot be written.
    """

    def draw(figure: "Figure") -> None:
        first, gaps, flow = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 3))
        _draw_requests(first, result, slo)
        _draw_gaps(gaps, result, slo)
        _draw_flow(flow, result)
        flow.set_xlabel("seconds after the start")
        flow.set_xlim(0, 1.01 * max(result.seconds, 1e-3))

    _draw(path, title, (9.0, 8.5), draw)


def plot_sweep(path: Path, title: str, summaries: Sequence[Summary], slo: Slo) -> None:
    """Draws latencies and throughput against the load of each run.

    Raises:
        BatonError, OSError: as ``plot_run``.
    """
    loads = [load_value(one.load) for one in summaries]
    closed = isinstance(summaries[0].load, ClosedLoop)

    def draw(figure: "Figure") -> None:
        (first, gaps, whole), (requests, tokens, shares) = figure.subplots(2, 3, sharex=True)
        _draw_percentiles(first, "time to first token", loads, [one.ttft_ms for one in summaries], slo.ttft)
        _draw_percentiles(gaps, "inter-token latency", loads, [one.itl_ms for one in summaries], slo.itl)
        _draw_percentiles(whole, "end to end", loads, [one.e2e_ms for one in summaries], slo.e2e)
        _draw_throughput(requests, loads, summaries, closed=closed)
        _draw_line(tokens, loads, [one.output_tokens_per_s for one in summaries], _GREEN, "output tokens")
        tokens.set_title("tokens per second")
        _draw_shares(shares, loads, summaries)
        for axes in (requests, tokens, shares):
            axes.set_xlabel("requests at a time" if closed else "requests per second offered")
            axes.set_xlim(0, 1.05 * max(loads))

    _draw(path, title, (12.0, 7.0), draw)


def _draw(path: Path, title: str, size: tuple[float, float], draw: Callable[["Figure"], None]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure  # not pyplot: no display, no state that outlives this

    with style.context(_STYLE):
        figure = Figure(figsize=size)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        draw(figure)
        try:
            figure.savefig(path, dpi=_DPI)
        except ValueError as error:
            raise BatonError(f"--plot: {error}") from error


def _draw_requests(axes: "Axes", result: RunResult, slo: Slo) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    good = [record for record in result.records if record.status == OK and record.arrivals]
    due = [record.due for record in good]
    size = 9 if len(good) < 2000 else 3
    for label, color, latency in (("end", _GREY, end_to_end), ("first token", _BLUE, time_to_first_token)):
        milliseconds = [latency(one) * 1e3 for one in good]
        axes.scatter(due, milliseconds, s=size, color=color, alpha=0.8, linewidths=0, label=label)
    failed = [record for record in result.records if record.status not in (OK, CUT_OFF)]
    if failed:
        ends = [max(end_to_end(one) * 1e3, 0.1) for one in failed]  # a logarithmic axis has no zero
        axes.scatter([one.due for one in failed], ends, s=18, color=_RED, marker="x", linewidths=1, label="error")
    _draw_objective(axes, slo.ttft, "TTFT objective")
    _draw_objective(axes, slo.e2e, "e2e objective")
    if good or failed:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("milliseconds")
    axes.set_title("each request, by when it was due")
    _legend_above(axes)


def _draw_gaps(axes: "Axes", result: RunResult, slo: Slo) -> None:
    edges = _edges(result.seconds)
    gaps = np.array([pair for record in result.records for pair in token_gaps(record)], np.float64).reshape(-1, 2)
    middles = (edges[:-1] + edges[1:]) / 2
    bins = np.minimum(np.digitize(gaps[:, 0], edges), _BINS) - 1
    for percent, color in ((99, _ORANGE), (50, _BLUE)):
        values = [
            float(np.percentile(inside, percent)) * 1e3 if (inside := gaps[bins == index, 1]).size else math.nan
            for index in range(len(middles))
        ]
        axes.plot(middles, values, color=color, linewidth=1.4, marker=".", markersize=3, label=f"p{percent}")
    _draw_objective(axes, slo.itl, "objective")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("milliseconds")
    axes.set_title("between tokens")
    _legend_above(axes)


def _draw_flow(axes: "Axes", result: RunResult) -> None:
    edges = _edges(result.seconds)
    arrivals = [arrival for record in result.records for arrival in record.arrivals]
    moments, counts = zip(*arrivals, strict=True) if arrivals else ((), ())
    tokens, _ = np.histogram(moments, edges, weights=counts)
    axes.stairs(tokens / np.diff(edges), edges, color=_GREEN, fill=True, alpha=0.55)
    axes.set_ylabel("output tokens/s", color=_GREEN)
    axes.set_ylim(bottom=0)
    axes.set_title("throughput, and requests in flight")
    running = axes.twinx()
    running.grid(False)
    running.spines["right"].set_visible(True)
    running.stairs(_in_flight(result.records, edges), edges, color=_ORANGE, linewidth=1.4)
    running.set_ylabel("in flight", color=_ORANGE)
    running.set_ylim(bottom=0)


def _in_flight(records: Sequence[Record], edges: "FloatArray") -> "FloatArray":
    """How many requests were under way between two edges, on average."""
    sent = np.array([record.sent for record in records])
    lasted = np.array([record.ended for record in records]) - sent
    # Request-seconds up to each edge; what one interval adds, over its length, is the mean within it.
    so_far = np.array([np.clip(edge - sent, 0, lasted).sum() for edge in edges])
    return np.diff(so_far) / np.diff(edges)


def _draw_percentiles(
    axes: "Axes", title: str, loads: Sequence[float], latencies: Sequence[Latency | None], objective: float | None
) -> None:
    for name, color in (("p99", _ORANGE), ("p90", _GREEN), ("p50", _BLUE)):
        _draw_line(axes, loads, [math.nan if one is None else getattr(one, name) for one in latencies], color, name)
    _draw_objective(axes, objective, "objective")
    axes.set_ylabel("milliseconds")
    axes.set_title(title)
    _legend_inside(axes)


def _draw_throughput(axes: "Axes", loads: Sequence[float], summaries: Sequence[Summary], *, closed: bool) -> None:
    if not closed:
        axes.plot([0, max(loads)], [0, max(loads)], color=_GREY, linewidth=1, linestyle=":", label="offered")
    _draw_line(axes, loads, [one.requests_per_s for one in summaries], _BLUE, "ended well")
    good = [one.goodput.requests_per_s for one in summaries if one.goodput is not None]
    if good:
        _draw_line(axes, loads, good, _ORANGE, "goodput")
    axes.set_title("requests per second")
    _legend_inside(axes)


def _draw_shares(axes: "Axes", loads: Sequence[float], summaries: Sequence[Summary]) -> None:
    failed = [sum(one.errors.values()) for one in summaries]
    sent = [count + one.requests for count, one in zip(failed, summaries, strict=True)]
    _draw_line(axes, loads, [100 * count / max(1, of) for count, of in zip(failed, sent, strict=True)], _RED, "errors")
    good = [100 * one.goodput.share for one in summaries if one.goodput is not None]
    if good:
        _draw_line(axes, loads, good, _ORANGE, "within objectives")
    axes.set_ylim(-2, 105)
    axes.set_ylabel("%")
    axes.set_title("of the requests")
    axes.legend(loc="center left", fontsize=8)


def _draw_line(axes: "Axes", loads: Sequence[float], values: Sequence[float], color: str, label: str) -> None:
    axes.plot(loads, values, color=color, linewidth=1.5, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)


def _draw_objective(axes: "Axes", seconds: float | None, label: str) -> None:
    if seconds is not None:
        axes.axhline(seconds * 1e3, color=_RED, linewidth=1, linestyle="--", label=label)


def _legend_above(axes: "Axes") -> None:
    """Beside the title of a wide picture."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=5,
        fontsize=8,
        borderaxespad=0.1,
        columnspacing=1.2,
        handlelength=1.4,
    )


def _legend_inside(axes: "Axes") -> None:
    axes.legend(loc="best", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")


def _edges(seconds: float) -> "FloatArray":
    return np.linspace(0, max(seconds, 1e-3), _BINS + 1)
