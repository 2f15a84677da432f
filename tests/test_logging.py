"""The log of both kinds of process: one line per event, its fields included, as text or as JSON."""

import json
import logging
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import executor_service.process
import scheduler_service.process

AWKWARD = 'a "b"\nc=\x1b[31m'
Log = Callable[[str], logging.Logger]


@pytest.fixture(params=[scheduler_service.process, executor_service.process], ids=lambda module: module.__name__)
def process(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture
def log(process: ModuleType) -> Iterator[Log]:
    root = logging.getLogger()
    before: list[logging.Handler] = []
    level = root.level

    def configure(log_format: str) -> logging.Logger:
        before.extend(root.handlers)  # pytest's own, which come after the fixtures
        root.handlers = []
        process.configure_logging("info", log_format)
        return logging.getLogger("baton.test")

    yield configure
    root.handlers = before
    root.setLevel(level)


def test_text(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    log("text").info("request %s", "ended", extra={"request_id": AWKWARD, "tokens": 3, "reason": "", "ms": 1.5})
    (line,) = capsys.readouterr().err.splitlines()
    _, _, rest = line.partition(" INFO ")
    assert rest == r'baton.test: request ended request_id="a \"b\"\nc=\u001b[31m" tokens=3 reason="" ms=1.5'


def test_json(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    log("json").warning("executor %s", "lost", extra={"request_id": AWKWARD, "tokens": 3})
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert event.pop("time")
    assert event == {
        "level": "WARNING",
        "logger": "baton.test",
        "message": "executor lost",
        "request_id": AWKWARD,
        "tokens": 3,
    }


def test_an_exception_is_one_line_of_json(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    logger = log("json")
    try:
        raise ValueError("oh")
    except ValueError:
        logger.exception("it failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: oh" in json.loads(line)["exc_info"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_level_holds(log: Log, log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log(log_format).debug("too much")
    assert capsys.readouterr().err == ""
