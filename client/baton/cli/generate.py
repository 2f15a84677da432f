"""``baton generate``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from baton.cli import options as shared
from baton.cli import sampling_flags as flags
from baton.cli.batch import json_writer, output_file, read_content, run_lines, text_writer
from baton.cli.outcome import exit_codes
from baton.cli.request_lines import json_lines, prompt_lines
from baton.cli.results import completion_object
from baton.client import Client
from baton.options import GenerateOptions
from baton.values import ChatMessage, Prompt

_PANEL = "Batches"
EXAMPLES = shared.examples(
    "baton generate 'def read_json(path):' --max-tokens 64 --temperature 0",
    "baton generate --chat 'Write a function `mean(values)`.'",
    "cat script.py | baton generate - --echo",
    "baton generate 'Is it a tool? ' --choice yes --choice no",
    "baton generate 'As JSON: ' --json-schema person.schema.json",
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
    max_tokens: flags.MaxTokens = 128,
    min_tokens: flags.MinTokens = None,
    stop: flags.Stop = None,
    include_stop: flags.IncludeStop = False,
    stop_id: flags.StopId = None,
    ignore_eos: flags.IgnoreEos = False,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    logit_bias: flags.LogitBias = None,
    allowed_id: flags.AllowedId = None,
    banned_id: flags.BannedId = None,
    seed: flags.Seed = None,
    json_schema: flags.JsonSchema = None,
    regex: flags.Regex = None,
    choice: flags.Choice = None,
    grammar: flags.Grammar = None,
    n: Annotated[int | None, typer.Option("--n", min=1, max=64, help="Parallel samples (default: 1).")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Log probabilities of each token and so many likeliest ones; for JSON."),
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, help="The same for the prompt's tokens; for JSON.")
    ] = None,
    timings: Annotated[bool, typer.Option("--timings", help="Tell when tokens came; for JSON.")] = False,
    priority: flags.Priority = None,
    queue_timeout: flags.QueueTimeout = None,
    cache_salt: flags.CacheSalt = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each request (default: no limit).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages to a chat model.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it comes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON objects.")] = False,
) -> None:
    """Continue a text, or many of them.

    A single continuation goes to stdout as it comes.

    A batch runs many requests at a time. A line of --input has one of prompt,
    token_ids and messages, maybe an id, and maybe any option of the Python
    client by its name there, such as max_tokens, stop or logprobs; where it
    does not say, the options below hold. A line that fails is told on stderr
    with its number and does not stop the others; the exit code is 1 then.
    """
    _check_usage(prompt, file, requests, output, chat=chat, echo=echo)
    as_json = as_json or requests is not None or output is not None
    if not as_json and (logprobs, prompt_logprobs, timings) != (None, None, False):
        raise typer.BadParameter("--logprobs, --prompt-logprobs and --timings need --json, --input or --output")
    sampling = flags.given(
        {
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "stop": stop,
            "include_stop": include_stop,
            "stop_token_ids": stop_id,
            "ignore_eos": ignore_eos,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "logit_bias": flags.biases(logit_bias),
            "allowed_token_ids": allowed_id,
            "banned_token_ids": banned_id,
            "seed": seed,
            "json_schema": flags.schema_text(json_schema),
            "regex": regex,
            "choice": choice,
            "grammar": flags.file_text(grammar, "--grammar"),
            "n": n,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "timings": timings,
            "priority": priority,
            "queue_timeout": queue_timeout,
            "cache_salt": cache_salt,
        }
    )
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
    if stream and not as_json and options.get("n", 1) == 1:
        _print_stream(client, request, timeout, options)
        return
    completion = client.generate(request, timeout=timeout, **options)
    if as_json:
        origin = {name: getattr(completion, name) for name in ("prompt_token_ids", "request_id", "model_fingerprint")}
        print(json.dumps({**completion_object(completion), **origin}, ensure_ascii=False))
        return
    for sample in completion.samples:
        if len(completion.samples) > 1:
            _print_now(f"==> sample {sample.index} <==\n")
        _print_now(sample.text)
        _end_line(sample.text)


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
        _end_line(stream.completion.text)


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end_line(text: str) -> None:
    if not text.endswith("\n"):
        _print_now("\n")
