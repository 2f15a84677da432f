"""What rows ask for beside a token, through plans, model and results: exact, and nobody else's matter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from baton_protos import execution_pb2 as pb
from executor_service import batch_builder, upload
from executor_service.masks import TokenMasks
from executor_service.step_plan import Int32s, PlanError, StepPlan, UInt8s
from executor_service.upload import StagingUploader
from tests.executor.builders import save_checkpoint
from tests.executor.serving import Serving, admission, random_sampling
from tests.executor_process.scheduler_stub import int32s

VOCABULARY = 199
EVERYTHING = pb.RowSampling(
    temperature=0.9,
    top_k=60,
    top_p=0.95,
    min_p=0.005,
    repetition_penalty=1.2,
    frequency_penalty=0.5,
    presence_penalty=-0.2,
    seed=77,
    bias_token_ids=int32s([5, 9]),
    bias_values=np.array([2.5, -3.0], "<f4").tobytes(),
    banned_token_ids=int32s([1, 2, 3]),
    min_tokens=8,
    stop_token_ids=int32s([0, 4]),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("features")
    return path, save_checkpoint(path, "qwen3")


@pytest.fixture(scope="module")
def checkpoint(model: tuple[Path, Any]) -> Path:
    return model[0]


@pytest.fixture(autouse=True, params=["shared", "staged"])
def _uploads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a device's uploads too: what is read before it has been sent is nonsense."""
    if request.param == "shared":
        return
    begin = StagingUploader._begin

    def begin_with_nonsense(self: StagingUploader, needed: int) -> None:
        begin(self, needed)
        self._there.fill_(0x7F)

    monkeypatch.setattr(upload, "_STAGE_BYTES", 1 << 13)  # many steps fill one
    monkeypatch.setattr(StagingUploader, "_begin", begin_with_nonsense)
    monkeypatch.setattr(batch_builder, "uploader_to", StagingUploader)


def prompt(seed: int, size: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, size).tolist()


def expected_logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' log probabilities of what follows each of ``tokens``."""
    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)])).logits[0]
    return torch.log_softmax(logits.double(), -1)


def test_sampled_logprobs(model: tuple[Path, Any]) -> None:
    """Raw ones are those of transformers, rows ask for as many as they like, in plan order."""
    path, reference = model
    serving = Serving(path)
    logs = {row: prompt(row, 20 + row) for row in range(4)}
    wants = {0: 5, 2: 0, 3: 20}
    admissions = []
    for row, log in logs.items():
        sampling = pb.RowSampling(top_p=1.0)
        if row in wants:
            sampling.num_logprobs = wants[row]
        admissions.append(admission(row, log, len(log), sampling))
    output = serving.step(admit=admissions, prefill=logs)
    columns = output.logprobs
    assert columns is not None
    assert columns.top_counts.tolist() == [5, 0, 20]
    ends = np.cumsum(columns.top_counts)
    for at, (row, count) in enumerate(wants.items()):
        expected = expected_logprobs(reference, logs[row])[-1]
        assert columns.logprobs[at] == pytest.approx(float(expected[output.token_ids[row]]), abs=1e-4)
        assert columns.ranks[at] == 1
        own = slice(ends[at] - count, ends[at])
        assert columns.top_token_ids[own].tolist() == expected.topk(count).indices.tolist()
        assert columns.top_logprobs[own] == pytest.approx(expected.topk(count).values.numpy(), abs=1e-4)


def test_prompt_logprobs(model: tuple[Path, Any]) -> None:
    """Of every prompt token but the first, whatever the chunks; more of them than one slice holds."""
    path, reference = model
    tokens = prompt(1, 150)
    expected = expected_logprobs(reference, tokens)
    sampling = pb.RowSampling(top_p=1.0, num_prompt_logprobs=3)
    whole: list[NDArray[np.float32]] = []
    for chunks in ([150], [1, 70, 2, 77], [149, 1]):
        serving = Serving(path)
        admissions, begin, logprobs, tops, next_position = [admission(1, tokens, 150, sampling)], 0, [], [], 1
        for count in chunks:
            chunk = (
                {1: tokens[begin : begin + count], 3: tokens[:5]} if begin == 0 else {1: tokens[begin : begin + count]}
            )
            mates = [admission(3, tokens[:5], 5, pb.RowSampling(top_p=1.0))] if begin == 0 else []
            output = serving.step(admit=admissions + mates, prefill=chunk)
            admissions, begin = [], begin + count
            for part in output.prompt_logprobs:
                assert (part.row, part.start_position) == (1, next_position)
                assert (part.logprobs.top_counts == 3).all()
                logprobs.append(part.logprobs.logprobs)
                tops.append(part.logprobs.top_token_ids)
                next_position += part.logprobs.logprobs.size
        assert next_position == 150
        assert serving.step(decode=[1]).prompt_logprobs == ()
        whole.append(np.concatenate(logprobs))
        following = torch.tensor(tokens[1:])
        own = expected[:-1].gather(1, following.unsqueeze(1)).squeeze(1)
        assert whole[-1] == pytest.approx(own.numpy(), abs=2e-4)
        assert np.concatenate(tops).reshape(149, 3).tolist() == expected[:-1].topk(3).indices.tolist()
    assert all(np.array_equal(one, whole[0]) for one in whole)


def test_a_readmitted_row_goes_on_as_if_nothing_had_happened(checkpoint: Path) -> None:
    """Penalties, min_tokens and noise are functions of the log: preemption at any token changes nothing."""
    log = prompt(2, 30)
    expected = Serving(checkpoint).generate(0, log, 30, EVERYTHING, 16)
    assert not set(expected[:8]) & {0, 4}
    for done in (1, 5, 9):
        again = Serving(checkpoint).generate(3, log + expected[:done], 30, EVERYTHING, 16 - done)
        assert again == expected[done:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_wait_for_min_tokens(checkpoint: Path, temperature: float) -> None:
    """The fifth token is the first that may be a stop id when four are the least; also after a preemption."""
    bias = np.array([100.0, 90.0], "<f4").tobytes()
    sampling = pb.RowSampling(temperature=temperature, top_p=1.0, bias_token_ids=int32s([7, 8]), bias_values=bias)
    sampling.min_tokens, sampling.stop_token_ids = 4, int32s([7, 5])
    log = prompt(6, 12)
    assert Serving(checkpoint).generate(0, log, 12, sampling, 6) == [8, 8, 8, 8, 7, 7]
    assert Serving(checkpoint).generate(0, [*log, 8, 8, 8], 12, sampling, 3) == [8, 7, 7]


def test_logs_are_kept_without_the_host_knowing_tokens(checkpoint: Path) -> None:
    """What the device sampled decides the next penalties: without them the row goes another way."""
    log = prompt(2, 30)
    without = pb.RowSampling()
    without.CopyFrom(EVERYTHING)
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        without.ClearField(name)
    serving = Serving(checkpoint)
    assert serving.generate(0, log, 30, EVERYTHING, 16) != serving.generate(0, log, 30, without, 16)


def test_audits_agree_with_an_honest_log(checkpoint: Path) -> None:
    """Whatever the chunks of the replay, and though another row shares the batch."""
    log = prompt(3, 25)
    output = Serving(checkpoint).generate(2, log, 25, EVERYTHING, 90)
    whole = log + output[:80]
    for chunks in ([105], [30, 3, 72]):
        serving = Serving(checkpoint)
        begin, audited, admissions = 0, 0, [admission(2, whole, 25, EVERYTHING, audit_from=25)]
        admissions.append(admission(0, log, 25, EVERYTHING))
        for count in chunks:
            prefill = {2: whole[begin : begin + count]} | ({} if begin else {0: log})
            step = serving.step(admit=admissions, prefill=prefill, sample=True)
            audited += step.audited_tokens
            assert step.audit_mismatch_rows.size == 0
            begin, admissions = begin + count, []
        assert audited == 80
        assert step.token_ids[0] == output[80]
        assert serving.step(decode=[2]).token_ids.tolist() == output[81:82]


def test_an_audited_row_is_an_ordinary_one_once_its_log_is_computed(checkpoint: Path) -> None:
    plain, log = pb.RowSampling(temperature=1.0, top_p=0.9, seed=3), prompt(5, 40)
    serving = Serving(checkpoint)
    state = serving.rows.sampling
    readmitted = admission(1, log, 25, plain, audit_from=25)
    assert serving.step(admit=[readmitted], prefill={1: log[:30]}, sample=False).audited_tokens == 6
    assert state.any_special
    assert serving.step(prefill={1: log[30:]}).audited_tokens == 9
    assert not state.any_special
    serving.step(admit=[admission(2, log, 25, EVERYTHING, audit_from=25)], prefill={2: log})
    assert serving.step(decode=[1, 2]).audited_tokens == 0
    assert state.any_special  # for what the other row asks for besides
    serving.step(release=[2])
    assert not state.any_special


def test_audits_find_what_is_wrong(checkpoint: Path) -> None:
    log = prompt(3, 25)
    output = Serving(checkpoint).generate(2, log, 25, EVERYTHING, 20)
    wrong = log + output[:-1] + [(output[-1] + 1) % VOCABULARY]
    step = Serving(checkpoint).step(admit=[admission(5, wrong, 25, EVERYTHING, audit_from=40)], prefill={5: wrong})
    assert step.audited_tokens == 5
    assert step.audit_mismatch_rows.tolist() == [5]
    other_seed = pb.RowSampling()
    other_seed.CopyFrom(EVERYTHING)
    other_seed.seed += 1
    honest = log + output
    step = Serving(checkpoint).step(admit=[admission(5, honest, 25, other_seed, audit_from=25)], prefill={5: honest})
    assert step.audited_tokens == 20
    assert step.audit_mismatch_rows.size > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_depends_on_itself_only(checkpoint: Path, dtype: torch.dtype, seed: int) -> None:
    """Tokens and log probabilities of a random row, bit by bit, alone and among random batch mates that come and go."""
    rng = np.random.default_rng(seed)
    sampling, log = random_sampling(rng, VOCABULARY), prompt(seed + 50, 40)
    sampling.num_logprobs = 3

    def run(mates: bool) -> list[tuple[int, bytes]]:
        serving, seen, others = Serving(checkpoint, dtype), [], dict[int, bool]()
        for step in range(12):
            admissions, prefill, decode = [], {}, []
            if step == 0:
                admissions.append(admission(4, log, 40, sampling))
                prefill[4] = log
            else:
                decode.append(4)
            released = [row for row in others if mates and rng.random() < 0.2]
            for row in released:
                del others[row]
            decode += list(others)
            for row in range(8):
                if mates and row != 4 and row not in others and row not in released and rng.random() < 0.4:
                    tokens = rng.integers(0, VOCABULARY, int(rng.integers(1, 30))).tolist()
                    prompt_len = int(rng.integers(1, len(tokens) + 1))
                    audit_from = prompt_len if rng.random() < 0.5 else 0
                    others[row] = True
                    prefill[row] = tokens
                    admissions.append(admission(row, tokens, prompt_len, random_sampling(rng, VOCABULARY), audit_from))
            decode = rng.permutation(decode).tolist()
            order = [*decode, *prefill]
            output = serving.step(admit=admissions, decode=decode, prefill=prefill, release=released)
            assert output.logprobs is not None
            reporting = [row for row in order if serving.rows.sampling.num_logprobs[row] >= 0]
            at = reporting.index(4)
            seen.append((int(output.token_ids[order.index(4)]), output.logprobs.logprobs[at : at + 1].tobytes()))
        return seen

    assert run(mates=True) == run(mates=False)


def test_nothing_is_left_of_a_row_that_is_gone(checkpoint: Path) -> None:
    """A plain request on the row of one that used everything, beside another that does, gets its plain tokens."""
    log, plain = prompt(4, 20), pb.RowSampling(temperature=3.0, top_p=1.0, seed=9)
    expected = Serving(checkpoint).generate(1, log, 20, plain, 5)
    serving = Serving(checkpoint)
    narrow = pb.RowSampling()
    narrow.CopyFrom(EVERYTHING)
    narrow.allowed_token_ids = int32s(list(range(20, 60)))
    serving.generate(1, log, 20, narrow, 3)
    serving.step(admit=[admission(1, log, 20, plain)], prefill={1: log}, sample=False)
    serving.step(release=[1])
    first = serving.step(
        admit=[admission(1, [], 0, plain), admission(6, log, 20, EVERYTHING)], prefill={1: log, 6: log}
    )
    tokens = [int(first.token_ids[0])] + [int(serving.step(decode=[1, 6]).token_ids[0]) for _ in range(4)]
    assert tokens == expected


def test_features_take_memory_when_they_are_used(checkpoint: Path) -> None:
    serving = Serving(checkpoint)
    state = serving.rows.sampling
    tables = (state.log, state.permitted, state.stops, state.bias_ids, state.bias_values)
    log = prompt(0, 9)
    serving.generate(0, log, 9, pb.RowSampling(temperature=1.0, top_p=0.9, top_k=3), 2)
    assert not state.any_special
    assert [table.is_allocated for table in tables] == [False] * 5
    serving.generate(0, log, 9, pb.RowSampling(top_p=1.0, frequency_penalty=1.0), 2)
    assert [table.is_allocated for table in tables] == [True, False, False, False, False]
    serving.generate(0, log, 9, EVERYTHING, 2)
    assert all(table.is_allocated for table in tables)
    assert not state.any_special


class _OnlyIds:
    """Masks that allow one id per step, whatever the row's tokens: counted up from the row's grammar."""

    def __init__(self) -> None:
        self.rows_with_grammar: dict[int, int] = {}
        self.accepted: list[tuple[list[int], list[bool]]] = []

    def reset(self) -> None:
        self.rows_with_grammar.clear()

    def apply(self, plan: StepPlan) -> None:
        for one in plan.admissions:
            if one.sampling.grammar:
                self.rows_with_grammar[one.row] = int(one.sampling.grammar)

    def begin(self, rows: Int32s) -> TokenMasks | None:
        indices = [index for index, row in enumerate(rows.tolist()) if row in self.rows_with_grammar]
        if not indices:
            return None
        ids = []
        for index in indices:
            row = int(rows[index])
            ids.append(self.rows_with_grammar[row])
            self.rows_with_grammar[row] += 1
        return _OneId(self, np.array(indices, np.int64), ids)


class _OneId:
    def __init__(self, source: _OnlyIds, rows: NDArray[np.int64], ids: list[int]) -> None:
        self._source = source
        self._ids = ids
        self.rows = rows

    def fill(self) -> torch.Tensor:
        bits = np.zeros((len(self._ids), 7), np.uint32)
        for at, token in enumerate(self._ids):
            bits[at, token // 32] = 1 << token % 32
        return torch.from_numpy(bits.view(np.int32))

    def accept(self, token_ids: Int32s, row_ok: NDArray[np.bool_]) -> UInt8s:
        self._source.accepted.append((token_ids.tolist(), row_ok.tolist()))
        ended = np.zeros(token_ids.size, np.uint8)
        ended[self.rows] = [token == 42 for token in self._ids]
        return ended


def test_masks_of_grammars(checkpoint: Path) -> None:
    """They narrow what is allowed, for their rows only; matchers see tokens and say which row has ended."""
    masks = _OnlyIds()
    serving = Serving(checkpoint, masks=masks)
    log = prompt(0, 10)
    plain = pb.RowSampling(top_p=1.0)
    grammar = pb.RowSampling(temperature=1.0, top_p=0.5, grammar="41", banned_token_ids=int32s([43]))
    expected = Serving(checkpoint).generate(0, log, 10, plain, 3)
    first = serving.step(admit=[admission(0, log, 10, plain), admission(2, log, 10, grammar)], prefill={0: log, 2: log})
    second, third = serving.step(decode=[2, 0]), serving.step(decode=[0, 2])
    assert first.token_ids.tolist() == [expected[0], 41]
    assert second.token_ids.tolist() == [42, expected[1]]
    assert (first.grammar_ended.tolist(), second.grammar_ended.tolist()) == ([], [1, 0])
    assert third.row_ok.tolist() == [True, False]  # 43 is banned: nothing is left
    assert third.token_ids.tolist() == [expected[2], 0]
    assert masks.accepted[-1] == ([expected[2], 0], [True, False])


def test_a_grammar_without_matchers_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="no matchers"):
        Serving(checkpoint).step(
            admit=[admission(0, [1, 2], 2, pb.RowSampling(top_p=1.0, grammar="g"))], prefill={0: [1, 2]}
        )
