"""How every command ends: exit codes and the one line on stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from baton.errors import BatonError, ConnectFailedError, OverloadedError

FAILED = 1
INTERRUPTED = 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what a command raises into an exit code and one ``error: ...`` line."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read stdout has gone. Python flushes stdout once more at its exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except BatonError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    except UnicodeDecodeError as error:
        print(f"error: the input is not UTF-8: {error.reason} at byte {error.start}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    except OSError as error:  # a file that cannot be read or written
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None


def one_line(error: BatonError) -> str:
    """What a person reads after ``error: ``."""
    message = " ".join(error.message.split())
    if isinstance(error, OverloadedError) and error.retry_after is not None:
        message += f"; retry in {error.retry_after:g} s"
    if isinstance(error, ConnectFailedError):
        message += "; is a cluster running? 'baton cluster' starts one"
    return message
