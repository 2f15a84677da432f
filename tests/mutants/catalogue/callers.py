"""Of api processes and the client library."""

from tests.mutants.mutant import Mutant

_API = "scheduler_service/api"
_TEST_RESUME = "tests/api/test_resume.py"

MUTANTS = (
    # api processes
    Mutant(
        "nothing is held back",
        f"{_API}/sample_text.py",
        "return self._give_out(held=self._finder.held)",
        "return self._give_out(held=0)",
    ),
    Mutant(
        "samples share a seed",
        f"{_API}/intake.py",
        "seed=sample_seed(live.seed, index),",
        "seed=live.seed,",
    ),
    Mutant(
        "output that the caller has is not passed on",
        f"{_API}/intake.py",
        "output_token_ids=next((tuple(point.token_ids) for point in request.resume if point.sample == index), ()),",
        "output_token_ids=(),",
    ),
    Mutant(
        "a stream that was held is never released",
        f"{_API}/engine_client.py",
        "            self._send(wire.encode_hold([], [stream.handle]))",
        "            pass",
    ),
    Mutant(
        "a returning reader gets all from the start",
        f"{_API}/streams.py",
        "        self._taken = num_tokens - self._first",
        "        self._taken = 0",
    ),
    Mutant(
        "an abort for an earlier call ends the later one",
        f"{_API}/live_requests.py",
        "if live is not None and live.call_arrived_at < taken_over_at:",
        "if live is not None:",
        _TEST_RESUME,
    ),
    Mutant(
        "a retry that was overtaken takes the stream back",
        f"{_API}/live_requests.py",
        "if arrived_at < live.call_arrived_at:",
        "if arrived_at < 0.0:",
        _TEST_RESUME,
        simulated=False,
    ),
    Mutant(
        "a copy that lags behind its caller is taken over",
        f"{_API}/live_requests.py",
        "return reaches and not self.is_superseded",
        "return not self.is_superseded",
        _TEST_RESUME,
    ),
    Mutant(
        "a retry gets the end of what was taken over elsewhere",
        f"{_API}/live_requests.py",
        "return reaches and not self.is_superseded",
        "return reaches",
        _TEST_RESUME,
    ),
    Mutant(
        "a whole text of a grammar goes on",
        f"{_API}/intake.py",
        "        return _Admitted(validated, grammar, complete)",
        "        return _Admitted(validated, grammar)",
        "tests/api/test_structured.py",
        simulated=False,
    ),
    # the client
    Mutant(
        "a continuation repeats text",
        "client/baton/stream_log.py",
        "token_ids=sample.token_ids, text_offset=sample.text_length)",
        "token_ids=sample.token_ids, text_offset=0)",
    ),
    Mutant(
        "a continuation lacks a token",
        "client/baton/stream_log.py",
        "token_ids=sample.token_ids, text_offset=sample.text_length)",
        "token_ids=sample.token_ids[:-1], text_offset=sample.text_length)",
    ),
    Mutant(
        "a continuation draws another seed",
        "client/baton/stream_log.py",
        "        request.sampling.seed = start.seed",
        "        pass",
    ),
    Mutant(
        "a stream that never begins is tried without end",
        "client/baton/stream_log.py",
        "and self._attempts + 1 < attempts",
        "and attempts > 0",
        "tests/client/test_resume.py",
        simulated=False,
    ),
)
