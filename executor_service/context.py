"""The inference context: what any layer may read about the step that is running."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from executor_service.metadata.attention import AttentionMetadata, OutputRows


@dataclass(frozen=True, slots=True)
class InferenceContext:
    """One step's metadata, set once before the model runs and gone after it.

    Attributes:
        attention: where keys and values go, and what queries see.
        output_rows: the tokens whose hidden states the step wants; None = all.
    """

    attention: AttentionMetadata
    output_rows: OutputRows | None = None


_current: InferenceContext | None = None


@contextmanager
def inference_context(context: InferenceContext) -> Iterator[None]:
    """Make ``context`` the one that ``get_context`` returns within the ``with`` block.

    Raises ``RuntimeError`` when another context is set: one thread runs one step at a time.
    """
    global _current
    if _current is not None:
        raise RuntimeError("an inference context is already set: steps do not nest")
    _current = context
    try:
        yield
    finally:
        _current = None


def get_context() -> InferenceContext:
    """The running step's context. Raises ``RuntimeError`` when no step is running."""
    if _current is None:
        raise RuntimeError("no inference context is set: layers run inside inference_context() only")
    return _current
