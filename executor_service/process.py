"""The process itself: dying with the parent, its log, what torch reads from the environment."""

import ctypes
import json
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
TORCH_DEFAULTS = {
    # Executors share cores with the scheduler and others. Threads that spin while they wait for their siblings then
    # spend the very time slices those siblings need: measured 20 times slower on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A step's tensors are new memory each time; huge pages spare it nearly all of its page faults.
    "THP_MEM_ALLOC_ENABLE": "1",
}
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Linux only; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(0)


def set_torch_defaults() -> None:
    """Set what torch and its OpenMP read from the environment when they load, where the user has not."""
    for name, value in TORCH_DEFAULTS.items():
        os.environ.setdefault(name, value)


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
