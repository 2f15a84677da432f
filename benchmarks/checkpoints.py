"""Checkpoints of real shapes with random weights, made once and kept."""

import argparse
from pathlib import Path
from typing import Final

from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from benchmarks.figures import note

DTYPE: Final = "bfloat16"
DEFAULT_MODELS = Path("~/.cache/baton/models").expanduser()
DEFAULT_SHAPES = ("qwen3-small", "qwen3-0.6b")


def cached_checkpoint(shape: str, models: Path) -> Path:
    """The checkpoint of a shape under ``models``; made if it is not there yet."""
    directory = models / f"{shape}-{DTYPE}"
    if not (directory / "config.json").is_file():
        note(f"making {directory}")
        write_random_checkpoint(SHAPES[shape], directory, dtype=DTYPE)
    return directory


def add_model_options(parser: argparse.ArgumentParser, shapes: tuple[str, ...] = DEFAULT_SHAPES) -> None:
    """``--shapes`` and ``--models``."""
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=list(shapes), metavar="SHAPE", help="of " + ", ".join(SHAPES)
    )
    parser.add_argument(
        "--models", type=Path, default=DEFAULT_MODELS, help=f"where checkpoints are kept (default {DEFAULT_MODELS})"
    )
