"""Finding stop strings in text that grows."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string in a sample's text; ``start`` and ``end`` are offsets in code points."""

    text: str
    start: int
    end: int


class StopStrings:
    """Several strings, looked for at the same time: the automaton of Aho and Corasick (CACM 18(6), 1975).

    A state stands for the longest suffix of the text that begins one of the strings; ``depth`` of it is how many
    characters that are.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Build the automaton; ``strings`` are not empty."""
        self._next: list[dict[str, int]] = [{}]
        self._fall: list[int] = [0]
        self._matches: list[str] = [""]  # the longest string that ends in this state
        self.depth: list[int] = [0]
        for string in strings:
            self._add(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character; 0 is the one before the first."""
        while state and character not in self._next[state]:
            state = self._fall[state]
        return self._next[state].get(character, 0)

    def match(self, state: int) -> str:
        """The longest of the strings that ends in this state; empty if none does."""
        return self._matches[state]

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            follower = self._next[state].get(character)
            if follower is None:
                follower = len(self._next)
                self._next[state][character] = follower
                self._next.append({})
                self._fall.append(0)
                self._matches.append("")
                self.depth.append(self.depth[state] + 1)
            state = follower
        self._matches[state] = string

    def _link(self) -> None:
        waiting = deque(self._next[0].values())  # breadth first: what a state falls back to is ready before it
        while waiting:
            state = waiting.popleft()
            for character, follower in self._next[state].items():
                self._fall[follower] = self.step(self._fall[state], character)
                self._matches[follower] = self._matches[follower] or self._matches[self._fall[follower]]
                waiting.append(follower)


class StopFinder:
    """Looks for stop strings in one sample's text, each character once.

    Of the strings that one token completes, the one that begins first counts, and of those the longest. Text that
    may still become part of a stop string is held back.

    Attributes:
        held: characters at the text's end that must not be sent yet.
    """

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._length = 0

    @property
    def held(self) -> int:
        return self._strings.depth[self._state]

    def push(self, text: str, *, may_stop: bool) -> StopMatch | None:
        """Add the text of a token; the match that it completes, unless the sample may not stop yet."""
        best: StopMatch | None = None
        for character in text:
            self._state = self._strings.step(self._state, character)
            self._length += 1
            found = self._strings.match(self._state)
            if found and may_stop:
                match = StopMatch(found, self._length - len(found), self._length)
                if best is None or (match.start, -match.end) < (best.start, -best.end):
                    best = match
        return best
