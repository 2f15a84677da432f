"""A run's figures for people: a table of one run, or a line for each run of a sweep."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from baton.bench.records import ClosedLoop, Load, OpenLoop, load_value
from baton.bench.summary import Latency, Summary

_NONE = "-"
_LAG_MS = 20.0  # a generator that is this late at the 99th percentile is not up to the load


def print_report(console: Console, summaries: Sequence[Summary]) -> None:
    """Prints all that is worth knowing of one run, or the essence of each of several."""
    if len(summaries) == 1:
        _print_run(console, summaries[0])
    else:
        console.print(_sweep_table(summaries))


def describe(load: Load) -> str:
    """How requests are offered, in a few words."""
    match load:
        case OpenLoop():
            return f"{load.rate:g} requests/s, {load.arrivals} arrivals"
        case ClosedLoop():
            return f"{load.concurrency} at a time"
        case _:
            return "as recorded"


def _print_run(console: Console, one: Summary) -> None:
    table = _table("milliseconds", "mean", "p50", "p90", "p99", "max")
    rows = (
        ("time to first token", one.ttft_ms),
        ("inter-token latency", one.itl_ms),
        ("end to end", one.e2e_ms),
        ("longest pause", one.pause_ms),
    )
    for name, latency in rows:
        table.add_row(name, *_cells(latency))
    console.print(table)
    figures = _table("throughput", "per second", "in all", f"in {one.seconds:.1f} s")
    figures.add_row("requests", f"{one.requests_per_s:,.2f}", f"{one.requests:,}", "")
    cached = f"{one.cached_tokens / one.input_tokens:.0%} from the prefix cache" if one.input_tokens else ""
    figures.add_row("prompt tokens", f"{one.input_tokens_per_s:,.1f}", f"{one.input_tokens:,}", cached)
    figures.add_row("output tokens", f"{one.output_tokens_per_s:,.1f}", f"{one.output_tokens:,}", "")
    if one.goodput is not None:
        figures.add_row("goodput", f"{one.goodput.requests_per_s:,.2f}", "", f"{one.goodput.share:.1%} of the requests")
    console.print()
    console.print(figures)
    for line in _remarks(one):
        console.print(line)


def _remarks(one: Summary) -> list[str]:
    lines = [f"ended with {status}: {count}" for status, count in one.errors.items()]
    if one.cut_off:
        lines.append(f"cut off by Ctrl-C: {one.cut_off}")
    if one.send_lag_ms is not None and one.send_lag_ms.p99 > _LAG_MS:
        lines.append(
            f"requests were sent late, the 99th percentile by {one.send_lag_ms.p99:.0f} ms: this machine or process "
            "is too busy to offer this load, and the latencies include that"
        )
    return [f"\n{line}" if not index else line for index, line in enumerate(lines)]


def _sweep_table(summaries: Sequence[Summary]) -> Table:
    closed = isinstance(summaries[0].load, ClosedLoop)
    columns = ["concurrency" if closed else "rate", "requests/s", "output tokens/s"]
    columns += [f"{name} {percentile}" for name in ("TTFT", "ITL", "e2e") for percentile in ("p50", "p99")]
    columns += ["goodput"] * (summaries[0].goodput is not None)
    columns += ["errors"]
    table = _table(*columns)
    for one in summaries:
        cells = [f"{load_value(one.load):g}", f"{one.requests_per_s:,.2f}", f"{one.output_tokens_per_s:,.1f}"]
        for latency in (one.ttft_ms, one.itl_ms, one.e2e_ms):
            cells += [_number(latency.p50), _number(latency.p99)] if latency is not None else [_NONE, _NONE]
        if one.goodput is not None:
            cells.append(f"{one.goodput.share:.1%}")
        table.add_row(*cells, str(sum(one.errors.values())) if one.errors else _NONE)
    table.caption = "latencies in milliseconds"
    table.caption_justify = "left"
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _cells(latency: Latency | None) -> list[str]:
    if latency is None:
        return [_NONE] * 5
    return [_number(value) for value in (latency.mean, latency.p50, latency.p90, latency.p99, latency.max)]


def _number(milliseconds: float) -> str:
    return f"{milliseconds:,.2f}" if milliseconds < 100 else f"{milliseconds:,.0f}"
