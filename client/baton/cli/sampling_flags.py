"""Flags for how tokens are chosen, when a request ends, and how it is treated; several commands share them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from baton.options import GenerateOptions

_SAMPLING, _STOPPING, _TREATMENT = "Sampling", "Stopping", "Treatment"
_STRUCTURE = "Structure"

Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 = greedy (default: 1).", rich_help_panel=_SAMPLING)]
TopK = Annotated[
    int | None, typer.Option(min=0, help="Among the k likeliest tokens (default: all).", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling (default: 1).", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Drop tokens less likely than this share of the likeliest (default: 0).",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=10.0,
        help="Above 1: tokens of prompt and output get less likely (default: 1).",
        rich_help_panel=_SAMPLING,
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        min=-2.0, max=2.0, help="Subtracted per occurrence in the output (default: 0).", rich_help_panel=_SAMPLING
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        min=-2.0, max=2.0, help="Subtracted from what is in the output (default: 0).", rich_help_panel=_SAMPLING
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=BIAS", help="Added to a token's logit, -100 to 100; repeatable.", rich_help_panel=_SAMPLING
    ),
]
AllowedId = Annotated[
    list[int] | None,
    typer.Option(
        "--allowed-id", metavar="ID", help="Sample only these token ids; repeatable.", rich_help_panel=_SAMPLING
    ),
]
BannedId = Annotated[
    list[int] | None,
    typer.Option("--banned-id", metavar="ID", help="Never sample this id; repeatable.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Same seed, same output (default: drawn).", rich_help_panel=_SAMPLING)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.", rich_help_panel=_STOPPING)]
MinTokens = Annotated[
    int | None, typer.Option(min=0, help="No stop of any kind before this many.", rich_help_panel=_STOPPING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End where this text appears; repeatable.", rich_help_panel=_STOPPING),
]
IncludeStop = Annotated[bool, typer.Option("--include-stop", help="Print that text, too.", rich_help_panel=_STOPPING)]
StopId = Annotated[
    list[int] | None,
    typer.Option("--stop-id", metavar="ID", help="End at this token id; repeatable.", rich_help_panel=_STOPPING),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past the end of the sequence.", rich_help_panel=_STOPPING)
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON", help="Write JSON that this schema allows: a file, or JSON.", rich_help_panel=_STRUCTURE
    ),
]
Regex = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Write a text that matches all of it.", rich_help_panel=_STRUCTURE)
]
Choice = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Write one of these texts; repeatable.", rich_help_panel=_STRUCTURE),
]
Grammar = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write what this Lark-like grammar allows.", rich_help_panel=_STRUCTURE),
]
Priority = Annotated[
    int | None,
    typer.Option(min=-1000, max=1000, help="Lower runs first, -1000 to 1000 (default: 0).", rich_help_panel=_TREATMENT),
]
QueueTimeout = Annotated[
    float | None,
    typer.Option(min=0.001, metavar="SECONDS", help="Fail unless it has started by then.", rich_help_panel=_TREATMENT),
]
CacheSalt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Share cached prefixes only with equal salts.", rich_help_panel=_TREATMENT),
]


def biases(flags: Sequence[str] | None) -> dict[int, float] | None:
    """Raises typer.BadParameter for what is no ID=BIAS."""
    if not flags:
        return None
    try:
        return {int(token_id): float(bias) for token_id, bias in (flag.split("=", 1) for flag in flags)}
    except ValueError:
        raise typer.BadParameter("--logit-bias wants a token id and a number, such as 42=-1.5") from None


def schema_text(flag: str | None) -> str | None:
    """The schema itself, whether the flag has it or names its file; raises typer.BadParameter for no file."""
    if flag is None or flag.lstrip().startswith("{"):
        return flag
    return file_text(Path(flag), "--json-schema")


def file_text(path: Path | None, flag: str) -> str | None:
    """Content of the file that ``flag`` names; raises typer.BadParameter if it cannot be read."""
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise typer.BadParameter(f"{flag}: cannot read {path}: {reason}") from error


def given(options: GenerateOptions) -> GenerateOptions:
    """Only what was said on the command line; a flag that was not given says nothing."""
    said = {name: value for name, value in options.items() if value is not None and value is not False and value != []}
    return cast(GenerateOptions, said)
