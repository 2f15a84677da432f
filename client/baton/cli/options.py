"""Options that several commands share."""

from typing import Annotated

import typer

from baton.messages import GenerateOptions

DEFAULT_SERVER = "127.0.0.1:50051"
TIMEOUT_SECONDS = 10.0  # for questions that a cluster answers at once

ServerOption = Annotated[str, typer.Option(help="The scheduler's gRPC address.", metavar="HOST:PORT")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
TemperatureOption = Annotated[float | None, typer.Option(min=0.0, help="0 = greedy (default: 1).")]
TopKOption = Annotated[int | None, typer.Option(min=0, help="Among the k likeliest tokens (default: all).")]
TopPOption = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling (default: 1).")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Same seed, same output (default: drawn).")]


def sampling_options(
    max_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> GenerateOptions:
    """The options above as keywords of the client."""
    return {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}


def examples(*commands: str) -> str:
    """An epilog for ``--help``: one command to a line."""
    return "\n\n".join(("Examples:", *(f"  {command}" for command in commands)))
