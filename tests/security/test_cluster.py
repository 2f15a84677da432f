"""A whole protected cluster: real processes, real sockets, and strangers before both of its ports."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton import (
    BatonError,
    Client,
    ClusterOptions,
    Completion,
    Credentials,
    FinishReason,
    LocalCluster,
    Stream,
    UnauthenticatedError,
    UnavailableError,
)
from baton.checkpoints import TINY_PYTHON
from baton.cluster_report import Reporter
from tests.e2e.harness import eventually

BATON = str(Path(sys.executable).with_name("baton"))
MAX_TOKENS = 400
SECONDS = 60.0


class Log(Reporter):
    """Remembers what the processes write."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, text: str) -> None:
        self.lines.append(text)

    def log(self, name: str, line: str) -> None:
        self.lines.append(f"{name}: {line}")

    def progress(self, text: str) -> None:
        pass


def credentials(keys: Path, tenant: str) -> Credentials:
    return Credentials(
        ca=keys / "ca.crt",
        cert=keys / "client-caller.crt",
        key=keys / "client-caller.key",
        token=(keys / f"token-{tenant}").read_text().strip(),
    )


@pytest.fixture(scope="module")
def log() -> Log:
    return Log()


@pytest.fixture(scope="module")
def cluster(keys: Path, log: Log) -> Iterator[LocalCluster]:
    scheduler = {
        "tls-cert": "server.crt",
        "tls-key": "server.key",
        "tls-client-ca": "ca.crt",
        "tokens": "tokens",
        "curve-key": "scheduler.key",
        "executor-keys": "executors",
    }
    options = ClusterOptions(
        model=TINY_PYTHON,
        port=0,
        api_processes=2,
        threads=1,
        num_blocks=1000,
        scheduler_arguments=[f"--{flag}={keys / file}" for flag, file in scheduler.items()],
        executor_arguments=[f"--curve-key={keys / 'executor-a.key'}", f"--scheduler-key={keys / 'scheduler.pub'}"],
        credentials=credentials(keys, "acme"),
    )
    with LocalCluster(options, log) as running:
        yield running


@pytest.fixture
def client(cluster: LocalCluster, keys: Path) -> Iterator[Client]:
    with Client(cluster.address, credentials=credentials(keys, "acme")) as connected:
        yield connected


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, keys: Path) -> Completion:
    with Client(cluster.address, credentials=credentials(keys, "acme")) as connected:
        return begin(connected).result()


@pytest.fixture
def neighbour(client: Client, undisturbed: Completion) -> Iterator[Stream]:
    """A stream of acme's that is under way; whatever a test does, it goes on as if nothing had happened."""
    stream = begin(client, request_id="mine")
    next(stream)
    yield stream
    completion = stream.result()
    assert completion.token_ids == undisturbed.token_ids
    assert completion.text == undisturbed.text
    assert completion.finish_reason is FinishReason.LENGTH


def begin(client: Client, **options: str) -> Stream:
    return client.stream("def f(", max_tokens=MAX_TOKENS, ignore_eos=True, seed=7, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", ["", "wrong-wrong-wrong-wrong"])
def test_a_client_without_a_valid_token_gets_nothing(
    token: str, cluster: LocalCluster, keys: Path, neighbour: Stream
) -> None:
    with Client(cluster.address, credentials=replace(credentials(keys, "acme"), token=token)) as stranger:
        stranger.wait_ready(SECONDS)  # health is everybody's
        for call in (
            lambda: begin(stranger).result(),
            lambda: stranger.generate("x", max_tokens=1),
            lambda: stranger.abort("mine"),
            lambda: stranger.tokenize("x"),
            stranger.model_info,
            stranger.cluster_status,
        ):
            with pytest.raises(UnauthenticatedError):
                call()


@pytest.mark.parametrize("why", ["no certificate", "another CA's", "plaintext"])
def test_a_client_without_a_certificate_gets_no_connection(
    why: str, cluster: LocalCluster, keys: Path, foreign_keys: Path, neighbour: Stream
) -> None:
    good = credentials(keys, "acme")
    bad = {
        "no certificate": replace(good, cert=None, key=None),
        "another CA's": replace(good, cert=foreign_keys / "client-caller.crt", key=foreign_keys / "client-caller.key"),
        "plaintext": Credentials(token=good.token),
    }[why]
    with Client(cluster.address, credentials=bad) as stranger, pytest.raises(UnavailableError):
        stranger.generate("x", max_tokens=1, timeout=SECONDS)


def test_a_tenant_cannot_end_anothers_request(cluster: LocalCluster, keys: Path, neighbour: Stream) -> None:
    for _ in range(4):  # each client reaches one of the two processes
        with Client(cluster.address, credentials=credentials(keys, "rival")) as rival:
            rival.abort("mine", "/mine", "acme/mine")
            with rival.stream("x", max_tokens=5, ignore_eos=True, request_id="mine") as own:
                assert len(own.result().token_ids) == 5


@pytest.mark.parametrize("keys_of", ["nobody", "another cluster"])
def test_an_executor_without_the_key_gets_nothing(
    keys_of: str, cluster: LocalCluster, client: Client, foreign_keys: Path, keys: Path, neighbour: Stream
) -> None:
    flags = {
        "nobody": [],
        "another cluster": [
            f"--curve-key={foreign_keys / 'executor-a.key'}",
            f"--scheduler-key={keys / 'scheduler.pub'}",
        ],
    }[keys_of]
    assert cluster._endpoints is not None
    command = [
        *(sys.executable, "-m", "executor_service", "--model", str(TINY_PYTHON), "--executor-id", "stranger"),
        *("--scheduler", cluster._endpoints.executors, "--num-blocks", "100", "--threads", "1", *flags),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as stranger:
        assert stranger.stderr is not None
        try:
            log = ""
            for line in stranger.stderr:
                log += line
                if "does not take this executor's key" in line:
                    break
            assert "does not take this executor's key" in log
            assert "welcomed" not in log
            assert [one.executor_id for one in client.cluster_status().executors] == ["executor-0"]
        finally:
            stranger.kill()


def test_the_command_line_with_flags_and_environment(
    cluster: LocalCluster, keys: Path, undisturbed: Completion, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--tls-ca={keys / 'ca.crt'}", f"--tls-cert={keys / 'client-caller.crt'}"]
    flags += [f"--tls-key={keys / 'client-caller.key'}", f"--token-file={keys / 'token-rival'}"]
    monkeypatch.setenv("BATON_TOKEN", "overridden-overridden")
    ask = ["generate", "def f(", "--seed", "7", "--max-tokens", "8", "--server", cluster.address]
    told = subprocess.run([BATON, *flags, *ask], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert undisturbed.text.startswith(told.stdout.rstrip("\n"))
    refused = subprocess.run([BATON, *flags[:3], *ask], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert refused.returncode == 1
    assert refused.stderr == "error: a valid token is needed: authorization: Bearer <token>\n"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_an_executor_listens_on_nothing(cluster: LocalCluster) -> None:
    listening = {
        line.split()[9]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    (pid,) = cluster.executor_pids().values()
    links = {str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    assert any(link.startswith("socket:") for link in links)
    assert not [inode for inode in listening if f"socket:[{inode}]" in links]


def test_no_process_has_failed(cluster: LocalCluster, log: Log, client: Client) -> None:
    """The last test: after all of the above."""
    assert cluster.failure is None
    assert eventually(lambda: client.cluster_status().executors[0].running_requests == 0, SECONDS)
    with pytest.raises(BatonError):
        client.generate("", max_tokens=1)
    assert not [line for line in log.lines if "Traceback" in line or "unexpected error" in line]
