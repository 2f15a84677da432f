"""What schedulers write about, read while they run: JSON lines of ``--log-format json``."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LogLine:
    """One event; ``at`` in seconds since the epoch, by the scheduler's clock."""

    at: float
    level: str
    message: str
    fields: dict[str, Any]


class SchedulerLog:
    """A log that grows; each line is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> list[LogLine]:
        """The lines that have come since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [_parse(line) for line in whole.splitlines() if line.startswith(b"{")]


def _parse(line: bytes) -> LogLine:
    fields = json.loads(line)
    at = datetime.fromisoformat(fields.pop("time")).timestamp()
    return LogLine(at, fields.pop("level"), fields.pop("message"), fields)
