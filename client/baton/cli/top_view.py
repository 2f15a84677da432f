"""A look at a cluster as rich draws it."""

from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.cli.status import by_name, headline, share
from baton.top import Look, Rates
from baton.values import ExecutorStatus, ModelInfo

_BAR_CELLS = 12
_TIGHT, _FULL = 0.8, 0.95  # shares of the KV blocks in use from which on a bar changes its colour
_NONE = "-"

_Cell = Callable[[ExecutorStatus, Rates | None], str]
_COLUMNS: dict[str, _Cell] = {
    "device": lambda one, _: one.device,
    "epoch": lambda one, _: str(one.epoch),
    "rows": lambda one, _: f"{one.running_requests}/{one.max_rows}",
    "waiting": lambda one, _: str(one.waiting_requests),
    "run-ahead": lambda one, _: f"{one.inflight_steps}/{one.run_ahead}",
    "step ms": lambda _, rates: _NONE if rates is None or rates.step_ms is None else f"{rates.step_ms:.2f}",
    "starved": lambda _, rates: _NONE if rates is None or rates.starved is None else f"{rates.starved:.0%}",
    "steps/s": lambda _, rates: _NONE if rates is None else f"{rates.steps_per_s:,.0f}",
    "tokens/s": lambda _, rates: _NONE if rates is None else f"{rates.tokens_per_s:,.0f}",
    "prefill/s": lambda _, rates: _NONE if rates is None else f"{rates.prefill_per_s:,.0f}",
    "preempted": lambda one, _: str(one.preemptions),
}
# Where a terminal is narrow.
_EXPENDABLE = ("preempted", "prefill/s", "steps/s", "epoch", "device", "run-ahead", "starved")


def draw(console: Console, model: ModelInfo, look: Look, note: str = "") -> RenderableType:
    """One frame: the cluster in two lines, then its executors; ``note`` goes below."""
    parts: list[RenderableType] = [Text(headline(model, look.status)), _summary(look), Text(), _fitting(console, look)]
    if note:
        parts += [Text(), Text(note, style="bold red")]
    return Group(*parts)


def _summary(look: Look) -> Text:
    executors = look.status.executors
    hits = sum(one.prefix_hit_tokens for one in executors)
    speed = look.tokens_per_s
    return Text(
        f"running: {sum(one.running_requests for one in executors):,}; "
        f"waiting: {sum(one.waiting_requests for one in executors):,}; "
        f"tokens/s: {_NONE if speed is None else f'{speed:,.0f}'}; "
        f"prefix hits: {share(hits, sum(one.prefix_query_tokens for one in executors))}; "
        f"sessions lost: {look.sessions_ended}"
    )


def _fitting(console: Console, look: Look) -> Table:
    """The table, without what the console has no room for."""
    names = list(_COLUMNS)
    table = _table(look, names)
    for name in _EXPENDABLE:
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            break
        names.remove(name)
        table = _table(look, names)
    return table


def _table(look: Look, names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("executor", no_wrap=True)
    table.add_column("KV used, cached", no_wrap=True)
    for name in names:
        table.add_column(name, justify="left" if name == "device" else "right", no_wrap=True)
    for one in by_name(look.status.executors):
        rates = look.rates.get(one.executor_id)
        table.add_row(one.executor_id, _blocks(one), *(_COLUMNS[name](one, rates) for name in names))
    for one in by_name(tuple(look.gone.values())):
        table.add_row(Text(one.executor_id, style="dim"), Text("gone", style="bold red"))
    return table


def _blocks(one: ExecutorStatus) -> Text:
    """A bar: blocks that requests own, then those that are only cached."""
    used, cached = (part / max(1, one.total_blocks) for part in (one.used_blocks, one.cached_blocks))
    style = "green" if used < _TIGHT else "yellow" if used < _FULL else "red"
    used_cells = -(-one.used_blocks * _BAR_CELLS // max(1, one.total_blocks))  # up: what is in use is never invisible
    cached_cells = min(_BAR_CELLS - used_cells, round(cached * _BAR_CELLS))
    bar = Text("█" * used_cells, style=style)
    bar.append("▒" * cached_cells, style="blue")
    bar.append("·" * (_BAR_CELLS - used_cells - cached_cells), style="dim")
    bar.append(f" {share(one.used_blocks, one.total_blocks):>4} {share(one.cached_blocks, one.total_blocks):>4}")
    return bar
