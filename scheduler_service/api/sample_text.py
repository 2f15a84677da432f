"""The text of one sample while its tokens come: what is certain, may be shown, and lies before a stop string."""

from collections.abc import Sequence

from scheduler_service.api.detokenizer import Detokenizer
from scheduler_service.api.stop_strings import StopFinder, StopMatch, StopStrings


class SampleText:
    """Turns tokens into text that can be sent.

    Nothing in it depends on how tokens are portioned: the same tokens give the same text, and end at the same one.

    Attributes:
        num_tokens: that have been pushed and count: up to the one that completed a stop string.
        match: the stop string that ended the text; None so far.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, stop: StopStrings | None, *, include_stop: bool, min_tokens: int
    ) -> None:
        """Create the text of a sample without tokens.

        Args:
            detokenizer: a fresh one; None = no text.
            stop: what ends the text.
            include_stop: whether the stop string belongs to the text.
            min_tokens: stop strings that are complete with so many tokens, or fewer, do not count.
        """
        self.num_tokens = 0
        self.match: StopMatch | None = None
        self._detokenizer = detokenizer
        self._finder = None if stop is None else StopFinder(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._length = 0  # code points given out
        self._pending = ""  # text after them that is certain

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; the text that can be sent now. Tokens after a stop string are ignored."""
        if self._detokenizer is None:
            self.num_tokens += len(token_ids)
            return ""
        if self._finder is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        for token_id in token_ids:
            if self.match is not None:
                break
            self.num_tokens += 1
            self._search(self._detokenizer.push((token_id,)), self._finder)
        return self._give_out(held=self._finder.held)

    def flush(self) -> str:
        """The sample has ended: what was held back. A stop string may appear only now."""
        if self._detokenizer is None or self.match is not None:
            return ""
        rest = self._detokenizer.flush()
        if self._finder is None:
            return rest
        self._search(rest, self._finder)
        return self._give_out(held=0)

    def _search(self, text: str, finder: StopFinder) -> None:
        self._pending += text
        self.match = finder.push(text, may_stop=self.num_tokens > self._min_tokens)

    def _give_out(self, *, held: int) -> str:
        count = len(self._pending) - held
        if self.match is not None:
            count = (self.match.end if self._include_stop else self.match.start) - self._length
        text, self._pending = self._pending[:count], self._pending[count:]
        if self.match is not None:
            self._pending = ""
        self._length += len(text)
        return text
