"""What every process of the scheduler does to itself at its start."""

import ctypes
import json
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that a crashed launcher leaves nothing behind.

    Linux only; elsewhere it does nothing. The signal comes when the *thread* that started this process ends, so the
    launcher starts its children from its main thread.

    Raises:
        OSError: the kernel refused.
        SystemExit: the parent has just died.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:
        raise SystemExit("the parent process has ended")


def configure_logging(level: str, log_format: str) -> None:
    """One line per event on stderr, its fields (``extra`` of the logging call) included; ``text`` or ``json``."""
    formatter: logging.Formatter = _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    if log_format == "json":
        from pythonjsonlogger.json import JsonFormatter

        names = {"levelname": "level", "name": "logger"}
        formatter = JsonFormatter([*names, "message"], rename_fields=names, timestamp="time", json_ensure_ascii=False)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _TextFormatter(logging.Formatter):
    """The message, then the event's fields as ``name=value``."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}
        return " ".join([super().formatMessage(record), *(f"{name}={_word(value)}" for name, value in fields.items())])


def _word(value: object) -> str:
    """Quoted where it would break the line or be taken for several."""
    text = str(value)
    plain = text.isprintable() and not {" ", '"', "="} & set(text) and text
    return text if plain else json.dumps(text)
