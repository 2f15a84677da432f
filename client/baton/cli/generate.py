"""``baton generate``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from baton.cli import options as shared
from baton.cli.batch import json_writer, output_file, read_content, run_lines, text_writer
from baton.cli.outcome import exit_codes
from baton.cli.request_lines import json_lines, prompt_lines
from baton.client import Client
from baton.messages import GenerateOptions
from baton.values import ChatMessage, Completion, Prompt

_PANEL = "Batches"
EXAMPLES = shared.examples(
    "baton generate 'def read_json(path):' --max-tokens 64 --temperature 0",
    "baton generate --chat 'Write a function `mean(values)`.'",
    "cat script.py | baton generate - --echo",
    "baton generate --file prompts.txt",
    "baton generate --input requests.jsonl --output results.jsonl",
    'echo \'{"id": "a", "prompt": "def f(", "max_tokens": 32}\' | baton generate --input -',
)


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to continue; '-' reads it from stdin.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A prompt on every line; '-' is stdin.", metavar="FILE", rich_help_panel=_PANEL),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--input", help="A JSON request on every line; '-' is stdin.", metavar="FILE", rich_help_panel=_PANEL
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write JSON results, one to a line in the order of the requests (default: stdout).",
            metavar="FILE",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=10_000, help="Most requests at a time.", rich_help_panel=_PANEL)
    ] = 64,
    server: shared.ServerOption = shared.DEFAULT_SERVER,
    max_tokens: shared.MaxTokensOption = 128,
    temperature: shared.TemperatureOption = None,
    top_k: shared.TopKOption = None,
    top_p: shared.TopPOption = None,
    seed: shared.SeedOption = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each request (default: no limit).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages to a chat model.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it comes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON objects.")] = False,
) -> None:
    """Continue a text, or many of them.

    A single continuation goes to stdout as it comes.

    A batch runs many requests at a time. A line of --input has one of prompt,
    token_ids and messages, maybe an id, and maybe max_tokens, temperature,
    top_k, top_p, seed, stop_token_ids and ignore_eos; where it does not say,
    the options below hold. A line that fails is told on stderr with its number
    and does not stop the others; the exit code is 1 then.
    """
    _check_usage(prompt, file, requests, output, chat=chat, echo=echo)
    sampling = shared.sampling_options(max_tokens, temperature, top_k, top_p, seed)
    with exit_codes(), Client(server) as client:
        if prompt is not None:
            text = sys.stdin.read() if prompt == "-" else prompt
            _generate_one(client, text, timeout, sampling, chat=chat, echo=echo, stream=stream, as_json=as_json)
            return
        if requests is not None:
            lines = json_lines(read_content(requests), sampling)
        else:
            assert file is not None
            lines = prompt_lines(read_content(file), sampling, chat=chat)
        client.model_info(timeout=shared.TIMEOUT_SECONDS)  # if nobody is there, say so once and overwrite nothing
        as_json = as_json or requests is not None or output is not None
        with output_file(output) as out:
            write = json_writer(out) if as_json else text_writer(out)
            # Results that appear on the terminal are progress enough, and a bar would be in their way.
            progress = False if out.isatty() else None
            run_lines(client, lines, write, concurrency=concurrency, timeout=timeout, progress=progress)


def _check_usage(
    prompt: str | None, file: Path | None, requests: Path | None, output: Path | None, *, chat: bool, echo: bool
) -> None:
    if sum(given is not None for given in (prompt, file, requests)) != 1:
        raise typer.BadParameter("give a prompt, --file, or --input, and only one of them")
    if output is not None and prompt is not None:
        raise typer.BadParameter("--output is for --file and --input; a single continuation goes to stdout")
    if echo and prompt is None:
        raise typer.BadParameter("--echo is for a single prompt")
    if chat and requests is not None:
        raise typer.BadParameter("--chat is not for --input: give the request 'messages'")


def _generate_one(
    client: Client,
    prompt: str,
    timeout: float | None,
    options: GenerateOptions,
    *,
    chat: bool,
    echo: bool,
    stream: bool,
    as_json: bool,
) -> None:
    request: Prompt = [ChatMessage("user", prompt)] if chat else prompt
    if echo and not as_json:
        _print_now(prompt)
    if stream and not as_json:
        _print_stream(client, request, timeout, options)
        return
    completion = client.generate(request, timeout=timeout, **options)
    if as_json:
        print(json.dumps(asdict(completion), ensure_ascii=False))
    else:
        _print_now(completion.text)
        _end_line(completion)


def _print_stream(client: Client, prompt: Prompt, timeout: float | None, options: GenerateOptions) -> None:
    with client.stream(prompt, timeout=timeout, **options) as stream:
        try:
            for delta in stream:
                _print_now(delta.text)
        except BaseException:
            # What follows, a shell's prompt or an error, starts on a line of its own.
            if sys.stdout.isatty():
                print(flush=True)
            raise
        _end_line(stream.completion)


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end_line(completion: Completion) -> None:
    if not completion.text.endswith("\n"):
        _print_now("\n")
