"""Matchers of rows: what they allow follows the grammar, whatever happens to the row and to its neighbours."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher
from numpy.typing import NDArray
from tokenizers import Tokenizer

from baton.checkpoints import TINY_PYTHON
from executor_service.grammar import GrammarRows
from executor_service.grammar_compiler import GrammarCompiler
from executor_service.masks import TokenMasks
from executor_service.step_plan import Admission, RowSampling, StepPlan

VOCAB_SIZE = 5000  # the tokenizer has 4096 ids: the rest pads the model's embedding
EOS = [0, 2]
PATTERN = "[a-z]{2,6}(, [0-9]{1,3}){0,2};?"
GRAMMAR = LLMatcher.grammar_from_regex(PATTERN)
WRONG = "start: missing"
# It compiles, and meets the library's limits when its first mask is computed.
TOO_LARGE = "start: A\nA: /(.|\\n)*/ & /(.*a.{60}b.*)/ & ~/(.*c.{50}d.*)/\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY_PYTHON / "tokenizer.json"))


@pytest.fixture
def rows() -> GrammarRows:
    return GrammarRows(GrammarCompiler(TINY_PYTHON, VOCAB_SIZE), VOCAB_SIZE)


def plan(admissions: Sequence[Admission] = (), released: Sequence[int] = ()) -> StepPlan:
    none = np.zeros(0, np.int32)
    return StepPlan(
        step_id=1,
        released_rows=np.array(released, np.int32),
        admissions=tuple(admissions),
        extend_rows=none,
        extend_blocks=none,
        rows=none,
        num_tokens=none,
        start_positions=none,
        flags=none.astype(np.uint8),
        prefill_token_ids=none,
        slot_mapping=none,
        table_hashes=none.astype(np.uint32),
    )


def admission(row: int, grammar: str = GRAMMAR, output: Sequence[int] = ()) -> Admission:
    """``row`` has a prompt of three tokens, which no grammar looks at, and ``output`` after them."""
    log = np.array([7, 8, 9, *output], np.int32)
    return Admission(row, np.zeros(0, np.int32), RowSampling(grammar=grammar), prompt_len=3, token_ids=log)


def begin(rows: GrammarRows, sampled: Sequence[int]) -> TokenMasks:
    masks = rows.begin(np.array(sampled, np.int32))
    assert masks is not None
    return masks


def allowed(masks: TokenMasks) -> list[NDArray[np.int64]]:
    """Ids that each of the step's grammar rows may sample."""
    bits = np.unpackbits(masks.fill().numpy().view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row[:VOCAB_SIZE]) for row in bits]


def accept(masks: TokenMasks, token_ids: Sequence[int], ok: Sequence[bool] | None = None) -> list[int]:
    row_ok = np.ones(len(token_ids), np.bool_) if ok is None else np.array(ok)
    ended: list[int] = masks.accept(np.array(token_ids, np.int32), row_ok).tolist()
    return ended


def test_rows_without_a_grammar_have_no_masks(rows: GrammarRows) -> None:
    rows.apply(plan([admission(1), admission(2, grammar="")]))
    assert rows.begin(np.array([2, 0], np.int32)) is None
    assert begin(rows, [0, 1, 2]).rows.tolist() == [1]


def test_random_walks_write_what_the_grammar_says(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    count = 24
    rows.apply(plan([admission(row) for row in range(count)]))
    outputs: list[list[int]] = [[] for _ in range(count)]
    running = list(range(count))
    while running:
        order = rng.permutation(running)
        masks = begin(rows, order)
        choices = allowed(masks)
        for row, ids in zip(order, choices, strict=True):
            text = tokenizer.decode(outputs[row])
            is_complete = re.fullmatch(PATTERN, text) is not None
            assert (set(EOS) & set(ids.tolist()) == set(EOS)) == is_complete, text
            assert ids.max() < tokenizer.get_vocab_size()
        token_ids = [int(rng.choice(ids)) for ids in choices]
        for row, token_id, ended in zip(order, token_ids, accept(masks, token_ids), strict=True):
            outputs[row].append(token_id)
            text = tokenizer.decode(outputs[row], skip_special_tokens=True)
            complete = re.fullmatch(PATTERN, text) is not None
            assert ended == (token_id in EOS or (complete and nothing_follows(text)))
            if ended:
                assert complete
                running.remove(row)
        rows.apply(plan())
    assert len({tuple(output) for output in outputs}) > count // 2


def nothing_follows(text: str) -> bool:
    return text.endswith(";")


def test_a_panic_of_the_library_fails_its_row_alone(rows: GrammarRows, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """pyo3's is no Exception either."""

    real = GrammarCompiler.matcher

    def matcher(compiler: GrammarCompiler, grammar: str, output: list[int]) -> LLMatcher:
        if grammar == WRONG:
            raise Panic("index out of bounds")
        return real(compiler, grammar, output)

    monkeypatch.setattr(GrammarCompiler, "matcher", matcher)
    rows.apply(plan([admission(0, WRONG), admission(1)]))
    nothing, some = allowed(begin(rows, [0, 1]))
    assert not nothing.size and some.size


def test_the_end_is_told_once_nothing_can_follow(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    rows.apply(plan([admission(0, LLMatcher.grammar_from_regex("ab?")), admission(1, 'start: "a"')]))
    a, b = tokenizer.encode("a").ids[0], tokenizer.encode("b").ids[0]
    first = begin(rows, [0, 1])
    first.fill()
    assert accept(first, [a, a]) == [0, 1]
    second = begin(rows, [1, 0])  # row 1 runs on until the scheduler has heard of its end
    assert [sorted(ids.tolist()) for ids in allowed(second)] == [EOS, sorted([*EOS, b])]
    assert accept(second, [EOS[0], b]) == [1, 1]


def test_an_end_of_sequence_completes_it(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    rows.apply(plan([admission(0, LLMatcher.grammar_from_regex("a*"))]))
    for token_id, ended in ((tokenizer.encode("a").ids[0], 0), (EOS[1], 1)):
        masks = begin(rows, [0])
        assert token_id in allowed(masks)[0]
        assert accept(masks, [token_id]) == [ended]


def test_a_readmitted_row_continues(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"enum": ["x", 12, None, True]}, "minItems": 2, "maxItems": 4}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    rng = np.random.default_rng(1)
    rows.apply(plan([admission(0, grammar)]))
    output: list[int] = []
    ended = 0
    while not ended:
        # Row 1 is admitted anew at every token, as after a preemption.
        rows.apply(plan([admission(1, grammar, output)], released=[1] if output else []))
        masks = begin(rows, [1, 0])
        anew, continuous = allowed(masks)
        assert np.array_equal(anew, continuous)
        token_id = int(rng.choice(anew))
        again, ended = accept(masks, [token_id, token_id])
        assert again == ended
        output.append(token_id)
    assert json.loads(tokenizer.decode(output, skip_special_tokens=True)) is not None


def test_a_row_fails_alone(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    z = tokenizer.encode("z").ids[0]
    rows.apply(
        plan(
            [
                admission(0),
                admission(1, WRONG),
                admission(2, output=[EOS[0]]),  # nothing begins with an end
                admission(3, LLMatcher.grammar_from_regex("a*")),
                admission(4, 'start[stop="END"]: /[a-z]*/'),  # it would have to take tokens back
                admission(5, TOO_LARGE),
            ]
        )
    )
    masks = begin(rows, [0, 1, 2, 3, 4, 5])
    good, wrong, contradicted, other, stop, large = allowed(masks)
    assert not wrong.size and not contradicted.size and not large.size
    assert z in good and z not in other and z in stop
    assert accept(masks, [z] * 6, [True, False, False, True, True, False])[:4] == [0, 0, 0, 0]
    masks = begin(rows, [4, 3, 0])
    _, strayed, good = allowed(masks)
    assert not strayed.size  # a token that its mask did not allow
    assert z in good


def test_a_row_that_was_not_sampled_does_not_move(rows: GrammarRows) -> None:
    rows.apply(plan([admission(0)]))
    masks = begin(rows, [0])
    before = allowed(masks)[0]
    assert accept(masks, [int(before[0])], [False]) == [0]
    assert np.array_equal(allowed(begin(rows, [0]))[0], before)


def test_the_next_mask_waits_for_the_token(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    """Steps are launched ahead: the mask of the next one is asked for before this one's token is known."""
    rows.apply(plan([admission(0, LLMatcher.grammar_from_regex("[xy]{2}"))]))
    x, y = tokenizer.encode("x").ids[0], tokenizer.encode("y").ids[0]
    first = begin(rows, [0])
    assert x in allowed(first)[0]
    with ThreadPoolExecutor(1) as main_thread:
        second = begin(rows, [0])
        waiting = main_thread.submit(allowed, second)
        assert not waiting.done()
        assert accept(first, [x]) == [0]
        assert waiting.result(timeout=60)[0].tolist() == sorted([x, y])
    assert accept(second, [y]) == [1]


def test_a_row_may_change_hands_before_its_last_token_is_known(rows: GrammarRows, tokenizer: Tokenizer) -> None:
    x, y = tokenizer.encode("x").ids[0], tokenizer.encode("y").ids[0]
    rows.apply(plan([admission(0, LLMatcher.grammar_from_regex("xy"))]))
    first = begin(rows, [0])
    first.fill()
    rows.apply(plan([admission(0, LLMatcher.grammar_from_regex("y"))], released=[0]))
    second = begin(rows, [0])
    assert accept(first, [x]) == [0]
    assert y in allowed(second)[0]
    assert accept(second, [y]) == [1]


def test_a_failed_step_holds_nobody_up(rows: GrammarRows) -> None:
    rows.apply(plan([admission(0)]))
    first = begin(rows, [0])
    first.fill()
    second = begin(rows, [0])
    first.abandon()
    with pytest.raises(RuntimeError, match="the step before failed"):
        second.fill()
    rows.reset()
    assert rows.begin(np.array([0], np.int32)) is None
    rows.apply(plan([admission(0)]))
    assert allowed(begin(rows, [0]))[0].size


def test_without_a_tokenizer_rows_with_a_grammar_fail(tmp_path: Path) -> None:
    rows = GrammarRows(GrammarCompiler(tmp_path, VOCAB_SIZE), VOCAB_SIZE)
    rows.apply(plan([admission(0)]))
    assert not allowed(begin(rows, [0]))[0].size


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, [5, 6]),
        ({"generation_config.json": {}, "config.json": {"text_config": {"eos_token_id": 7}}}, [7]),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, [2]),
    ],
)
def test_the_end_of_sequence_is_where_the_scheduler_finds_it(
    tmp_path: Path, tokenizer: Tokenizer, files: dict[str, dict[str, object]], expected: list[int]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((TINY_PYTHON / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    rows = GrammarRows(GrammarCompiler(tmp_path, VOCAB_SIZE), VOCAB_SIZE)
    rows.apply(plan([admission(0, LLMatcher.grammar_from_regex("a?"))]))
    begin(rows, [0]).fill()
    a = tokenizer.encode("a").ids[0]
    assert sorted(allowed(begin_after(rows, a))[0].tolist()) == expected


def begin_after(rows: GrammarRows, token_id: int) -> TokenMasks:
    """The step after ``token_id`` of row 0, which is admitted with it."""
    grammar = LLMatcher.grammar_from_regex("a?")
    rows.reset()
    rows.apply(plan([admission(0, grammar, [token_id])]))
    return begin(rows, [0])
