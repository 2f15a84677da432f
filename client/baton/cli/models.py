"""``baton models``: checkpoints with random weights, to try a shape without downloading it."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.checkpoints.shapes import DTYPE_BYTES, SHAPES, DType
from baton.cli.options import examples
from baton.cli.outcome import exit_codes
from baton.errors import BatonError
from baton.progress import byte_progress

_PIPED_WIDTH = 200  # nobody looks at a pipe's width: never cut a cell

app = typer.Typer(
    help="Make checkpoints of real shapes with random weights, for tests and benchmarks.",
    epilog=examples("baton models list", "baton models make qwen3-0.6b /tmp/qwen3", "baton cluster --model /tmp/qwen3"),
    no_args_is_help=True,
)


def _known_shape(name: str) -> str:
    if name not in SHAPES:
        raise typer.BadParameter(f"there is no {name!r}, but {', '.join(SHAPES)}")
    return name


@app.command("list")
def list_shapes() -> None:
    """List the shapes that `make` knows."""
    with exit_codes():
        table = Table(box=None, pad_edge=False)
        for column in ("shape", "family"):
            table.add_column(column, no_wrap=True)
        for column in ("layers", "hidden", "heads", "KV heads", "context", "parameters", "bfloat16"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, shape in SHAPES.items():
            table.add_row(
                name,
                shape.family,
                str(shape.num_hidden_layers),
                str(shape.hidden_size),
                str(shape.num_attention_heads),
                str(shape.num_key_value_heads),
                str(shape.max_position_embeddings),
                f"{shape.parameters() / 1e6:,.1f} M",
                _size(shape.parameters() * DTYPE_BYTES["bfloat16"]),
            )
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        Console(highlight=False, soft_wrap=True, width=width).print(table)


@app.command("make", epilog=examples("baton models make qwen3-tiny /tmp/tiny --dtype float32"))
def make(
    shape: Annotated[str, typer.Argument(callback=_known_shape, help="One of `baton models list`.", metavar="SHAPE")],
    directory: Annotated[Path, typer.Argument(help="Directory to make.", metavar="DIR", file_okay=False)],
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is there.")] = False,
) -> None:
    """Write a checkpoint that loads like the real one and says nothing sensible."""
    with exit_codes():
        if not force and (directory / "config.json").exists():
            raise BatonError(f"{directory} holds a checkpoint already; --force replaces it")
        total = SHAPES[shape].parameters() * DTYPE_BYTES[dtype]
        _write(shape, directory, dtype, seed, total)
        print(f"{directory}: {shape}, {dtype}, {_size(total)} of weights; try: baton cluster --model {directory}")


def _write(shape: str, directory: Path, dtype: DType, seed: int, total: int) -> None:
    try:
        from baton.checkpoints.random_weights import write_random_checkpoint  # here: it needs torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BatonError("torch is not installed here: pip install 'baton[executor]'") from error
    try:
        with byte_progress(total) as progress:
            write_random_checkpoint(SHAPES[shape], directory, dtype=dtype, seed=seed, progress=progress)
    except FileExistsError as error:
        raise BatonError(str(error)) from error


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
