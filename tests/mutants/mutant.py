"""A planted defect."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In ``path``, ``old``, which is there exactly once, becomes ``new``.

    Attributes:
        tests: files for what the simulator cannot see; it goes first all the same, unless ``simulated`` is False.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str = ""
    simulated: bool = True
