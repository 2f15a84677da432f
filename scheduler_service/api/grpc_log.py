"""Faults of callers: gRPC answers them, but logs each with a traceback, by which strangers could fill a disk."""

import logging
import traceback
from types import SimpleNamespace

from grpc._cython import cygrpc

_LIBRARY = "grpc._cython.cygrpc"
_MEANINGS = {
    "DecodeError": "a caller sent bytes that are no message",
    "ExecuteBatchError": "a caller left while it was being answered",
}


class _OnceWithoutTraceback(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        kind = type(error).__name__
        if kind not in _MEANINGS:
            return True
        if kind in self._told:
            return False
        self._told.add(kind)
        record.msg, record.args, record.exc_info = "%s", (_MEANINGS[kind],), None
        return True


def log_callers_faults_once() -> None:
    """Log the first of each kind in a line, and no other."""
    # What it logs when an answer finds nobody any more, gRPC prints as well.
    cygrpc.traceback = SimpleNamespace(**{**vars(traceback), "print_exc": lambda: None})
    logger = logging.getLogger(_LIBRARY)
    if not any(isinstance(each, _OnceWithoutTraceback) for each in logger.filters):
        logger.addFilter(_OnceWithoutTraceback())
