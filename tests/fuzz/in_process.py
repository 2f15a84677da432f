"""The targets that need no process of their own, by name."""

from collections.abc import Callable
from typing import Protocol

from tests.fuzz.api_target import ApiTarget
from tests.fuzz.dialects_target import DialectsTarget
from tests.fuzz.engine_target import EngineTarget
from tests.fuzz.executor_target import ExecutorTarget


class Target(Protocol):
    """What hostile messages are thrown at. Whatever gives in raises."""

    served: int  # what neighbours asked for and got

    def throw(self) -> None:
        """Throw ``frames_per_throw`` messages."""

    @property
    def frames_per_throw(self) -> int: ...

    def finish(self) -> None:
        """Check what can be checked at the end only."""

    def close(self) -> None:
        """Free what it holds."""


TARGETS: dict[str, Callable[[int], Target]] = {
    "engine": EngineTarget,
    "engine with a traitor": lambda seed: EngineTarget(seed, betrayed=True),
    "executor": ExecutorTarget,
    "api": ApiTarget,
    "dialects": DialectsTarget,
}


def run(name: str, seed: int, messages: int, progress: Callable[[int], None]) -> tuple[int, int]:
    """Throw at least so many messages at a target; how many, and what neighbours got meanwhile.

    Raises:
        Exception: whatever gave in, with the seed.
    """
    target = TARGETS[name](seed)
    sent = 0
    try:
        while sent < messages:
            target.throw()
            sent += target.frames_per_throw
            progress(sent)
        target.finish()
    except Exception as error:
        error.add_note(f"{name}, seed {seed}, after {sent} messages")
        raise
    finally:
        target.close()
    return sent, target.served
