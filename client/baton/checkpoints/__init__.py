"""Checkpoints that come with Baton, and the scripts that make checkpoints.

``tiny_python`` ships in the package; `baton.checkpoints.train_tiny_python` made it, and
`baton.checkpoints.random_weights` writes untrained checkpoints of real shapes for tests and benchmarks.
"""

from pathlib import Path
from typing import Final

__all__ = ["TINY_PYTHON"]

TINY_PYTHON: Final[Path] = Path(__file__).resolve().parent / "tiny_python"
"""Directory of the shipped checkpoint: a 5-million-parameter Qwen3 trained on Python's standard library."""
