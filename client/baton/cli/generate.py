"""``baton generate``."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from baton.cli.outcome import exit_codes
from baton.client import Client
from baton.messages import GenerateOptions
from baton.values import ChatMessage, Completion, Prompt

DEFAULT_SERVER = "127.0.0.1:50051"
ServerOption = Annotated[str, typer.Option(help="The scheduler's gRPC address.", metavar="HOST:PORT")]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue; '-' reads it from stdin.", show_default=False)],
    server: ServerOption = DEFAULT_SERVER,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 = greedy (default: 1).")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Among the k likeliest tokens (default: all).")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling (default: 1).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same output (default: drawn).")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the whole request (default: no limit).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it comes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Continue a text; the continuation goes to stdout as it comes."""
    if prompt == "-":
        prompt = sys.stdin.read()
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    with exit_codes(), Client(server) as client:
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
