"""``baton top``."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from baton.cli.options import DEFAULT_SERVER, TIMEOUT_SECONDS, ServerOption, examples
from baton.cli.outcome import exit_codes
from baton.cli.top_view import draw
from baton.client import Client
from baton.errors import BatonError
from baton.top import History, Look

_QUIT = "q"
_MAX_TYPED = 256
_PIPED_WIDTH = 200  # nobody looks at a pipe's width: never cut a cell
EXAMPLES = examples("baton top", "baton top --interval 0.2", "baton top --once")


def top(
    server: ServerOption = DEFAULT_SERVER,
    interval: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame; so it is, too, if stdout is no terminal.")
    ] = False,
) -> None:
    """Watch a cluster at work: executors, memory, queues and speed.

    q or Ctrl-C leaves. Rates are those of the last interval. Tokens/s are tokens
    sampled; prefill/s are tokens of prompts, and those computed again.
    """
    with exit_codes(), Client(server) as client:
        history = History()
        if once or not sys.stdout.isatty():
            _look(client, history)  # rates need two looks
            time.sleep(interval)
            width = None if sys.stdout.isatty() else _PIPED_WIDTH
            look = _look(client, history)
            model = client.model_info(timeout=TIMEOUT_SECONDS)
            console = Console(highlight=False, width=width)
            console.print(draw(console, model, look), soft_wrap=True)
        else:
            _watch(client, history, interval)


def _look(client: Client, history: History) -> Look:
    return history.look(client.cluster_status(timeout=TIMEOUT_SECONDS), time.monotonic())


def _watch(client: Client, history: History, interval: float) -> None:
    """Draws until q is pressed. A scheduler that goes away once it has been seen is waited for."""
    look, model = _look(client, history), client.model_info(timeout=TIMEOUT_SECONDS)
    console = Console(highlight=False)
    frame = draw(console, model, look)
    with _keys_at_once(), Live(frame, console=console, screen=True, auto_refresh=False) as live:
        while not _pressed(_QUIT, interval):
            note = ""
            try:
                look, model = _look(client, history), client.model_info(timeout=TIMEOUT_SECONDS)
            except BatonError as error:
                note = error.message
            live.update(draw(console, model, look, note), refresh=True)


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    """Has the terminal hand over keys without waiting for Enter, and without showing them."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pressed(key: str, seconds: float) -> bool:
    """Whether ``key`` is pressed, or the terminal gone, within ``seconds``; other keys are passed over."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            typed = os.read(sys.stdin.fileno(), _MAX_TYPED)  # not sys.stdin.read: select knows nothing of its buffer
            if not typed or key in typed.decode(errors="replace"):
                return True
    return False
