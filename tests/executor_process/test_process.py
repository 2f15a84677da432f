"""``python -m executor_service`` as it runs for real: a checkpoint, a scheduler on a socket, signals."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton.checkpoints.random_weights import SHAPES, write_random_checkpoint
from baton_protos import execution_pb2 as pb
from executor_service.config import ConfigError, load_settings
from executor_service.fingerprint import model_fingerprint
from executor_service.startup import serve
from tests.executor_process.scheduler_stub import PlanMaker, SchedulerStub, tokens

GREEDY = pb.RowSampling(top_p=1.0)
ROOT = Path(__file__).parents[2]
BLOCK_SIZE = 8
RUN_AHEAD = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen3-tiny"
    write_random_checkpoint(SHAPES["qwen3-tiny"], path, dtype="float32")
    return path


def start(endpoint: str, checkpoint: Path, *flags: str) -> subprocess.Popen[str]:
    # one thread: a tiny model gains nothing from more, and with other work on the machine they wait for each other
    command = [sys.executable, "-m", "executor_service", "--threads", "1"]
    command += ["--scheduler", endpoint, "--model", str(checkpoint), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def scheduler(checkpoint: Path) -> Iterator[SchedulerStub]:
    """With one executor, which must end well on SIGTERM."""
    scheduler = SchedulerStub()
    sizes = ["--block-size", str(BLOCK_SIZE), "--num-blocks", "40", "--max-rows", "4", "--max-batched-tokens", "64"]
    process = start(scheduler.endpoint, checkpoint, *sizes, "--device", "cpu", "--max-model-len", "200")
    scheduler.welcome()
    yield scheduler
    process.terminate()
    stdout, stderr = process.communicate(timeout=10)
    scheduler.close()
    assert process.returncode == 0
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "session begins scheduler_id=stub epoch=1" in stderr


def expected_tokens(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    from transformers import Qwen3ForCausalLM  # takes seconds to import

    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = list(prompt)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    torch.set_num_threads(threads)
    return ids[len(prompt) :]


def generate(scheduler: SchedulerStub, prompts: dict[int, list[int]], count: int) -> dict[int, list[int]]:
    """Greedy tokens of two rows, the second admitted two steps after the first and prefilled in two chunks."""
    (first, second), maker = prompts, PlanMaker(block_size=BLOCK_SIZE)
    outputs: dict[int, list[int]] = {first: [], second: []}
    blocks = {first: [30, 2, 17, 4, 25, 6], second: [39, 1, 0, 16, 3, 12]}
    plans = [
        (maker.plan(admit={first: (blocks[first], GREEDY)}, prefill={first: prompts[first]}), [first]),
        (maker.plan(decode=[first]), [first]),
    ]
    half = len(prompts[second]) // 2
    admit = {second: (blocks[second], GREEDY)}
    chunk = maker.plan(admit=admit, decode=[first], prefill={second: prompts[second][:half]}, sample=False)
    plans.append((chunk, [first]))
    plans.append((maker.plan(decode=[first], prefill={second: prompts[second][half:]}), [first, second]))
    plans += [(maker.plan(decode=rows), rows) for rows in [[second, first], [first, second]] * (count // 2)]
    settled = 0
    for sent, (plan, _) in enumerate(plans, start=1):
        scheduler.send_plan(plan)
        if sent - settled >= RUN_AHEAD or sent == len(plans):
            for _ in range(sent - settled if sent == len(plans) else 1):
                settled += 1
                for row, token in zip(plans[settled - 1][1], tokens(scheduler.result(settled)), strict=True):
                    outputs[row].append(token)
    return {row: output[:count] for row, output in outputs.items()}


def test_greedy_tokens_equal_transformers(scheduler: SchedulerStub, checkpoint: Path) -> None:
    scheduler.restart()
    prompts = {2: [17, 400, 3, 99, 250, 251, 7, 8, 9, 1000, 2000], 0: [5, 6, 4000, 8, 300, 12, 13]}
    outputs = generate(scheduler, prompts, 20)
    assert outputs == {row: expected_tokens(checkpoint, prompt, 20) for row, prompt in prompts.items()}


def test_epochs_leave_no_trace(scheduler: SchedulerStub) -> None:
    prompts = {2: [17, 400, 3], 0: [5, 6, 4000, 8]}
    outputs = []
    for _ in range(2):
        scheduler.restart()
        outputs.append(generate(scheduler, prompts, 6))
    assert outputs[0] == outputs[1]


def test_sampling_depends_on_seed_and_position_alone(scheduler: SchedulerStub) -> None:
    drawn = []
    for row, seed in [(0, 7), (3, 7), (0, 8)]:
        scheduler.restart()
        maker = PlanMaker(block_size=BLOCK_SIZE)
        sampling = pb.RowSampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        scheduler.send_plan(maker.plan(admit={row: ([9, 10], sampling)}, prefill={row: [1, 2, 3]}))
        for _ in range(8):
            scheduler.send_plan(maker.plan(decode=[row]))
        drawn.append([tokens(scheduler.result(step_id))[0] for step_id in range(1, 10)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_hello_reports_the_executor(scheduler: SchedulerStub, checkpoint: Path) -> None:
    hello = scheduler.hello
    assert hello.model == "qwen3-tiny"
    assert hello.model_fingerprint == model_fingerprint(checkpoint)
    assert f"torch={torch.__version__}" in hello.kernel_fingerprint
    assert (hello.device, hello.dtype, hello.vocab_size) == ("cpu", "float32", 4160)
    assert (hello.block_size, hello.num_blocks, hello.max_rows) == (BLOCK_SIZE, 40, 4)
    assert (hello.max_batched_tokens, hello.max_model_len) == (64, 200)


def test_memory_is_never_more_than_useful(checkpoint: Path) -> None:
    scheduler = SchedulerStub()
    process = start(scheduler.endpoint, checkpoint, "--max-rows", "3", "--max-model-len", "100")
    try:
        hello = scheduler.welcome()
        assert hello.num_blocks == 3 * 7
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
        scheduler.close()
    assert process.returncode == 0


def wait_for_log(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"no {text!r} in the log")


def test_sigterm_while_connecting(checkpoint: Path) -> None:
    process = start("tcp://127.0.0.1:9", checkpoint, "--num-blocks", "4")
    wait_for_log(process, "ready in")
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG")
def test_die_with_parent() -> None:
    child_code = "import executor_service.process as p; p.die_with_parent(); print('ready', flush=True); input()"
    parent_code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child_code!r}])"
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.stdout.read() == ""  # ends when the child, too, has closed the pipe; its own input stays open
    parent.communicate()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-model-len", "4096"], "--max-model-len: 4096 is more than the 2048 positions of the checkpoint"),
        (["--kv-memory", "1KiB"], "--kv-memory: 1024 bytes do not hold two blocks of 24576 bytes"),
        (["--scheduler", "tcp://localhost:nonsense"], "--scheduler: cannot dial 'tcp://localhost:nonsense'"),
        (["--scheduler", " , "], "--scheduler: no scheduler is named"),
    ],
)
def test_settings_that_cannot_be_served(checkpoint: Path, flags: list[str], message: str) -> None:
    settings = load_settings(["--scheduler", "tcp://127.0.0.1:9", "--model", str(checkpoint), *flags])
    with pytest.raises(ConfigError) as raised:
        serve(settings)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_missing_checkpoint_exits_with_2_and_one_line(tmp_path: Path) -> None:
    process = start("tcp://127.0.0.1:9", tmp_path)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr == f"error: --model: cannot read {tmp_path}/config.json: No such file or directory\n"
