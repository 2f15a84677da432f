"""``baton bench``."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from baton.bench import lengths, plot, slo
from baton.bench.arrivals import Arrivals
from baton.bench.lengths import Lengths
from baton.bench.load import Extent
from baton.bench.records import OK, ClosedLoop, Load, OpenLoop, Record, Replay
from baton.bench.report import describe, print_report
from baton.bench.session import Plan, Session, run_session
from baton.bench.slo import Slo
from baton.bench.summary import Summary, summarize
from baton.bench.trace import TraceRequest, parse_trace
from baton.bench.workload import SyntheticWorkload, TraceWorkload, Vocabulary, Workload
from baton.cli import options as shared
from baton.cli.batch import output_file, read_content
from baton.cli.outcome import INTERRUPTED, exit_codes
from baton.client import Client
from baton.cluster_options import ClusterOptions
from baton.cluster_report import TerminalReporter
from baton.credentials import Credentials
from baton.errors import BatonError, InvalidRequestError
from baton.local_cluster import LocalCluster
from baton.progress import request_progress
from baton.values import ModelInfo

_LOAD, _REQUESTS, _RESULTS = "Load", "Requests", "Results"
_DEFAULT_CONCURRENCY = 8
_DEFAULT_REQUESTS = 64
_PIPED_WIDTH = 200  # nobody looks at a pipe's width: never cut a cell
_T = TypeVar("_T")
EXAMPLES = shared.examples(
    "baton bench --rate 4 --duration 60 --input-tokens uniform:32-256 --output-tokens 64",
    "baton bench --concurrency 16 --num-requests 200 --shared-prefix 100",
    "baton bench --sweep 1,2,4,8 --slo ttft=200ms,itl=50ms --plot sweep.png --json sweep.json",
    "baton bench --trace mooncake.jsonl --plot trace.png",
    "baton bench --model ~/models/Qwen3-0.6B --executors 2 --rate 2",
)


def bench(
    server: shared.ServerOption = shared.DEFAULT_SERVER,
    model: Annotated[
        Path | None,
        typer.Option(help="Measure a private cluster with this checkpoint instead of a server.", metavar="DIR"),
    ] = None,
    executors: Annotated[int, typer.Option(min=1, max=64, help="Executor processes of the private cluster.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, whether or not earlier ones have ended.", rich_help_panel=_LOAD),
    ] = None,
    arrivals: Annotated[
        Arrivals | None,
        typer.Option(help="How --rate is spread in time (default: poisson).", rich_help_panel=_LOAD),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help=f"Requests at a time, each followed by the next (default: {_DEFAULT_CONCURRENCY}).",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="A run for each of these rates, or each concurrency.",
            metavar="1,2,4|concurrency:1,2,4",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Requests of a run (default: {_DEFAULT_REQUESTS}, or all of a trace).", rich_help_panel=_LOAD
        ),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for which a run sends requests.", rich_help_panel=_LOAD)
    ] = None,
    warm_up: Annotated[
        int, typer.Option(min=0, help="Requests before the first run that are not measured.", rich_help_panel=_LOAD)
    ] = 8,
    connections: Annotated[
        int, typer.Option(min=1, max=1024, help="gRPC connections to share.", rich_help_panel=_LOAD)
    ] = 4,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for each request (default: no limit).", rich_help_panel=_LOAD)
    ] = None,
    input_tokens: Annotated[
        str, typer.Option(help=f"Lengths of prompts: {lengths.SYNTAX}.", metavar="LENGTHS", rich_help_panel=_REQUESTS)
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(help="Lengths of outputs, likewise.", metavar="LENGTHS", rich_help_panel=_REQUESTS)
    ] = "64",
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="So many equal tokens before every prompt.", rich_help_panel=_REQUESTS)
    ] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Requests of a file instead: JSON lines with offset (seconds), prompt or input_tokens, and "
            "output_tokens; or a Mooncake trace. '-' is stdin.",
            metavar="FILE",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.", rich_help_panel=_REQUESTS)] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same requests.", rich_help_panel=_REQUESTS)] = 0,
    objectives: Annotated[
        str | None,
        typer.Option("--slo", help="Count requests that are so fast.", metavar=slo.SYNTAX, rich_help_panel=_RESULTS),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write all figures; '-' is stdout.", metavar="FILE", rich_help_panel=_RESULTS),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw it: .png, .svg or .pdf.", metavar="FILE", rich_help_panel=_RESULTS),
    ] = None,
) -> None:
    """Load a cluster with requests and measure what callers get.

    Prompts are random tokens, outputs go on past the end-of-sequence token.
    With --rate, latencies count from the moment at which a request was due.
    Ctrl-C ends the measurement and prints what there is.
    """
    loads = _loads(rate, arrivals, concurrency, sweep, replay=trace is not None)
    prompts, outputs = _parsed(Lengths.parse, input_tokens), _parsed(Lengths.parse, output_tokens)
    limits = Slo() if objectives is None else _parsed(Slo.parse, objectives)
    with exit_codes():
        if plot_file is not None:
            plot.require_matplotlib()
        recorded = None if trace is None else parse_trace(read_content(trace))
        if num_requests is None and duration is None:
            num_requests = _DEFAULT_REQUESTS if recorded is None else len(recorded)
        with _target(server, model, executors) as (target, credentials):
            with Client(target, credentials=credentials) as client:
                served = client.model_info(timeout=shared.TIMEOUT_SECONDS)
            vocabulary = Vocabulary(served.vocab_size, served.max_total_tokens)
            workload: Workload = (
                SyntheticWorkload(vocabulary, prompts, outputs, shared_prefix, seed)
                if recorded is None
                else TraceWorkload(vocabulary, recorded, seed)
            )
            if Replay() in loads and workload.offsets is None:
                raise InvalidRequestError("the trace does not say when requests came: give --rate or --concurrency")
            plan = Plan(loads, Extent(num_requests, duration), warm_up, connections, temperature, timeout, seed)
            session = _measure(target, credentials, plan, workload)
        if not session.results:
            raise KeyboardInterrupt
        summaries = [summarize(result, limits) for result in session.results]
        title = _title(served, loads, _workload_words(recorded, prompts, outputs, shared_prefix))
        if json_file is not None:
            _write_json(json_file, served, title, summaries, interrupted=session.interrupted)
        if json_file is None or str(json_file) != "-":
            _print(title, summaries)
        if plot_file is not None:
            if sweep is None:
                plot.plot_run(plot_file, title, session.results[0], limits)
            else:
                plot.plot_sweep(plot_file, title, summaries, limits)
        _raise_if_all_failed(session)
    if session.interrupted:
        raise typer.Exit(INTERRUPTED)


def _loads(
    rate: float | None, arrivals: Arrivals | None, concurrency: int | None, sweep: str | None, *, replay: bool
) -> list[Load]:
    if sum(given is not None for given in (rate, concurrency, sweep)) > 1:
        raise typer.BadParameter("give one of --rate, --concurrency and --sweep")
    if rate is not None:
        return [OpenLoop(_positive("--rate", rate), arrivals or Arrivals.POISSON)]
    if sweep is not None and not sweep.startswith("concurrency:"):
        values = _numbers(sweep, float)
        return [OpenLoop(_positive("--sweep", value), arrivals or Arrivals.POISSON) for value in values]
    if arrivals is not None:
        raise typer.BadParameter("--arrivals is for --rate and a --sweep of rates")
    if sweep is not None:
        values = _numbers(sweep.removeprefix("concurrency:"), int)
        return [ClosedLoop(int(_positive("--sweep", value))) for value in values]
    if concurrency is None and replay:
        return [Replay()]
    return [ClosedLoop(concurrency or _DEFAULT_CONCURRENCY)]


def _numbers(text: str, kind: type[int] | type[float]) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--sweep: {text!r} is no list of numbers") from None


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{name}: must be above 0")
    return value


def _parsed(parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except InvalidRequestError as error:
        raise typer.BadParameter(error.message) from error


@contextmanager
def _target(server: str, model: Path | None, executors: int) -> Iterator[tuple[str, Credentials | None]]:
    """Whom to measure: a running server, or a cluster that lasts as long as the block."""
    if model is None:
        yield server, None
        return
    reporter = TerminalReporter(quiet_seconds=None)
    cluster = LocalCluster(ClusterOptions(model=model, executors=executors, port=0), reporter)
    try:
        cluster.start()
        reporter.finish_progress()
        yield cluster.address, Credentials()
    finally:
        reporter.finish_progress()
        cluster.stop()


def _measure(target: str, credentials: Credentials | None, plan: Plan, workload: Workload) -> Session:
    count = plan.extent.num_requests
    total = None if count is None or plan.extent.seconds is not None else count * len(plan.loads)
    with request_progress(total) as advance:

        def count_tokens(record: Record) -> None:
            advance(sum(tokens for _, tokens in record.arrivals))

        return run_session(target, credentials, plan, workload, count_tokens)


def _workload_words(recorded: Sequence[TraceRequest] | None, prompts: Lengths, outputs: Lengths, prefix: int) -> str:
    if recorded is not None:
        return "prompts and outputs of a trace"
    shared_words = f"{prefix} shared and " if prefix else ""
    return f"prompts of {shared_words}{prompts} tokens, outputs of {outputs}"


def _title(served: ModelInfo, loads: Sequence[Load], workload: str) -> str:
    dtype = f" ({served.dtype})" if served.dtype else ""
    load = describe(loads[0]) if len(loads) == 1 else f"{len(loads)} runs"
    return f"{served.model}{dtype}: {load}; {workload}"


def _print(title: str, summaries: Sequence[Summary]) -> None:
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    console.print(title, markup=False)
    console.print()
    print_report(console, summaries)


def _write_json(path: Path, served: ModelInfo, title: str, summaries: Sequence[Summary], *, interrupted: bool) -> None:
    document = {
        "baton": version("baton"),
        "title": title,
        "model": asdict(served),
        "interrupted": interrupted,
        "runs": [asdict(one) for one in summaries],
    }
    with output_file(path) as file:
        print(json.dumps(document, ensure_ascii=False), file=file)


def _raise_if_all_failed(session: Session) -> None:
    records = [record for result in session.results for record in result.records]
    failed = next((record for record in records if record.error), None)
    if failed is not None and not any(record.status == OK for record in records):
        raise BatonError(f"no request ended well: {failed.error}", code=failed.status)
