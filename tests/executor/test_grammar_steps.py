"""Rows with a grammar in real steps: however far steps are launched ahead, tokens are the same."""

import queue
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from baton.checkpoints import TINY_PYTHON
from baton_protos import execution_pb2 as pb
from executor_service.block_tables import BlockTables
from executor_service.completion import Completer, InlineCompleter, LaunchedStep, ThreadCompleter
from executor_service.config import load_settings
from executor_service.executor import StepLauncher
from executor_service.grammar import GrammarRows
from executor_service.grammar_compiler import GrammarCompiler
from executor_service.startup import prepare
from executor_service.step_plan import EXPLICIT, SAMPLE, Admission, Fault, RowSampling, StepPlan, StepResult

from .serving import Serving, admission

BLOCK_SIZE = 16
BLOCKS_PER_ROW = 6
ROWS = 4
STEPS = 60
VOCAB_SIZE = 4096
PATTERN = "[a-z]{3}(, [0-9]{1,3}){2,8}\\."
NEVER_ENDS = "[a-z ]*"


class Results:
    """A sink that keeps what it gets, in order."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[StepResult | Fault] = queue.SimpleQueue()

    def result(self, epoch: int, result: StepResult) -> None:
        self.queue.put(result)

    def fault(self, epoch: int, fault: Fault) -> None:
        self.queue.put(fault)

    def take(self, count: int) -> list[StepResult]:
        taken = [self.queue.get(timeout=60) for _ in range(count)]
        faults = [one for one in taken if isinstance(one, Fault)]
        assert not faults
        return [one for one in taken if isinstance(one, StepResult)]


@pytest.fixture(scope="module")
def launcher() -> StepLauncher:
    arguments = ["--model", str(TINY_PYTHON), "--num-blocks", "64", "--max-rows", str(ROWS), "--threads", "1"]
    return prepare(load_settings([*arguments, "--block-size", str(BLOCK_SIZE), "--max-batched-tokens", "64"]))[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY_PYTHON / "tokenizer.json"))


def drive(
    launcher: StepLauncher, completer: Callable[[Results], Completer], prompt: Sequence[int], patterns: Sequence[str]
) -> list[StepResult]:
    """Run one row for each pattern ("" = no grammar), past their ends: the scheduler hears of them later."""
    sink = Results()
    finish = completer(sink)
    tables = BlockTables(ROWS, BLOCKS_PER_ROW, ROWS * BLOCKS_PER_ROW, BLOCK_SIZE)
    rows = np.arange(len(patterns), dtype=np.int32)
    shares = rows[:, None] * BLOCKS_PER_ROW + np.arange(BLOCKS_PER_ROW, dtype=np.int32)
    tables.append(np.repeat(rows, BLOCKS_PER_ROW), shares.ravel())
    admissions = tuple(
        Admission(row, shares[row], sampling(pattern, seed=row), len(prompt), np.array(prompt, np.int32))
        for row, pattern in enumerate(patterns)
    )
    launcher.reset()
    for step in range(STEPS):
        plan = step_plan(step, tables, rows, prompt, admissions)
        finish.submit(LaunchedStep(1, step + 1, launcher.launch(plan), 0.0, 0.0, 0, after_idle=False))
    return sink.take(STEPS)


def sampling(pattern: str, seed: int) -> RowSampling:
    grammar = LLMatcher.grammar_from_regex(pattern) if pattern else ""
    return RowSampling(temperature=1.0, seed=seed, grammar=grammar)


def step_plan(
    step: int, tables: BlockTables, rows: np.ndarray, prompt: Sequence[int], admissions: tuple[Admission, ...]
) -> StepPlan:
    """Step 0 computes the prompts, every later one a token of each row."""
    none = np.zeros(0, np.int32)
    count = len(prompt) if step == 0 else 1
    start = 0 if step == 0 else len(prompt) + step - 1
    positions = np.tile(np.arange(start, start + count), rows.size)
    return StepPlan(
        step_id=step + 1,
        released_rows=none,
        admissions=admissions if step == 0 else (),
        extend_rows=none,
        extend_blocks=none,
        rows=rows,
        num_tokens=np.full(rows.size, count, np.int32),
        start_positions=np.full(rows.size, start, np.int32),
        flags=np.full(rows.size, SAMPLE | (EXPLICIT if step == 0 else 0), np.uint8),
        prefill_token_ids=np.tile(np.array(prompt, np.int32), rows.size) if step == 0 else none,
        slot_mapping=tables.slots(np.repeat(rows, count), positions).astype(np.int32),
        table_hashes=tables.hashes(rows),
    )


def outputs(results: Sequence[StepResult], row: int) -> tuple[list[int], int | None]:
    """A row's tokens up to the one that completes its grammar, and that step."""
    ended = [step for step, one in enumerate(results) if one.grammar_ended.size and one.grammar_ended[row]]
    last = ended[0] if ended else None
    return [int(one.token_ids[row]) for one in results[: STEPS if last is None else last + 1]], last


def test_tokens_do_not_depend_on_how_far_steps_are_launched_ahead(launcher: StepLauncher, tokenizer: Tokenizer) -> None:
    """The copy-wait thread takes tokens while the main thread launches the next step, as on a GPU."""
    prompt = tokenizer.encode("def names(path):\n").ids
    patterns = [PATTERN, "", NEVER_ENDS, PATTERN]
    inline = drive(launcher, InlineCompleter, prompt, patterns)
    threaded = drive(launcher, ThreadCompleter, prompt, patterns)
    assert [one.token_ids.tolist() for one in threaded] == [one.token_ids.tolist() for one in inline]
    assert [one.grammar_ended.tolist() for one in threaded] == [one.grammar_ended.tolist() for one in inline]
    assert not any(one.row_status.any() for one in inline)
    texts = []
    for row in (0, 3):
        token_ids, last = outputs(inline, row)
        assert last is not None
        texts.append(tokenizer.decode(token_ids, skip_special_tokens=True))
    assert all(text[3:5] == ", " and text[-1] == "." for text in texts) and texts[0] != texts[1]
    assert outputs(inline, 1)[1] is None


def test_rows_with_a_grammar_are_audited(tokenizer: Tokenizer) -> None:
    """Their last tokens are sampled again as their grammar allows, beside those of other rows and in any chunks."""
    serving = Serving(TINY_PYTHON, masks=GrammarRows(GrammarCompiler(TINY_PYTHON, VOCAB_SIZE), VOCAB_SIZE))
    plain = pb.RowSampling(temperature=1.0, top_p=1.0, seed=3)
    ruled = pb.RowSampling(temperature=1.0, top_p=1.0, seed=3, grammar=LLMatcher.grammar_from_regex(NEVER_ENDS))
    prompt = tokenizer.encode("x = ").ids
    begin = len(prompt)
    logs = [prompt + serving.generate(0, prompt, begin, sampling, 40) for sampling in (plain, ruled)]
    admitted = [admission(row, logs[row], begin, (plain, ruled)[row], audit_from=begin) for row in range(2)]
    cut = begin + 30
    steps = [
        serving.step(admit=admitted, prefill={row: log[:cut] for row, log in enumerate(logs)}, sample=False),
        serving.step(prefill={row: log[cut:] for row, log in enumerate(logs)}),
    ]
    assert [step.audited_tokens for step in steps] == [31 + 7, 9 + 9]
    assert not any(step.audit_mismatch_rows.size for step in steps)
    serving.step(release=[0, 1])
    # It is the masks that make them equal; and a token that the grammar allows is wrong where another one was sampled.
    unruled = admission(0, logs[1], begin, plain, audit_from=begin)
    assert serving.step(admit=[unruled], prefill={0: logs[1]}).audit_mismatch_rows.size
    (letter,) = tokenizer.encode("q").ids
    assert logs[1][-5] != letter
    wrong = [*logs[1][:-5], letter, *logs[1][-4:]]
    forged = admission(1, wrong, begin, ruled, audit_from=begin)
    assert 1 in serving.step(admit=[forged], prefill={1: wrong}).audit_mismatch_rows


def test_a_broken_grammar_fails_its_row_alone(launcher: StepLauncher, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("x = ").ids
    inline = drive(launcher, InlineCompleter, prompt, [PATTERN, "(?=a)b", ""])
    assert all(one.row_status.tolist() == [0, 1, 0] for one in inline[:3])
    expected = drive(launcher, InlineCompleter, prompt, [PATTERN])
    assert outputs(inline, 0) == outputs(expected, 0)
