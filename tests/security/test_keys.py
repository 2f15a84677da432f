"""``baton keys``: what it makes, for whom it can be read, and what it leaves alone."""

import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import zmq
from zmq.auth import load_certificate

from baton.keys import KeyDirectory, KeysError
from scheduler_service.tokens import load_tokens

BATON = str(Path(sys.executable).with_name("baton"))


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BATON, "keys", *arguments], capture_output=True, text=True, timeout=60, check=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_by_default_it_makes_a_scheduler_and_an_executor(tmp_path: Path) -> None:
    made = run(str(tmp_path / "k"))
    assert (made.returncode, made.stderr) == (0, "")
    assert set(contents(tmp_path / "k")) == {
        "scheduler.key",
        "scheduler.pub",
        "executor-executor.key",
        "executors/executor.pub",
    }
    for flag in ("--curve-key", "--executor-keys", "--scheduler-key"):
        assert flag in made.stdout
    public, secret = load_certificate(tmp_path / "k" / "executor-executor.key")
    assert secret is not None
    assert zmq.curve_public(secret) == public
    assert load_certificate(tmp_path / "k" / "executors" / "executor.pub") == (public, None)


def test_secrets_are_their_owners_only(tmp_path: Path) -> None:
    directory = tmp_path / "k"
    flags = ("--executor", "a", "--host", "h.example", "--client", "c", "--tenant", "t")
    assert run(str(directory), *flags).returncode == 0
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    secret = {"scheduler.key", "executor-a.key", "ca.key", "server.key", "client-c.key", "token-t", "tokens"}
    modes = {name: stat.S_IMODE((directory / name).stat().st_mode) for name in contents(directory)}
    assert {name for name, mode in modes.items() if mode == 0o600} == secret
    assert {mode for name, mode in modes.items() if name not in secret} == {0o644}
    assert (directory / "token-t").read_bytes().strip() not in (directory / "tokens").read_bytes()
    assert load_tokens(directory / "tokens").tenant((directory / "token-t").read_text().strip()) == "t"


@pytest.mark.parametrize("what", ["executor", "server", "client", "tenant"])
def test_nothing_is_overwritten_without_force(what: str, tmp_path: Path) -> None:
    def make(*, force: bool) -> None:
        made = KeyDirectory(tmp_path, force=force)
        {
            "executor": lambda: made.executor("x"),
            "server": lambda: made.server(["x"], days=1),
            "client": lambda: made.client("x", days=1),
            "tenant": lambda: made.tenant("x"),
        }[what]()

    make(force=False)
    before = contents(tmp_path)
    with pytest.raises(KeysError, match="--force"):
        make(force=False)
    assert contents(tmp_path) == before
    make(force=True)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    kept = {"scheduler.key", "scheduler.pub", "ca.key", "ca.crt"}  # what others depend on
    assert {name for name in after if after[name] == before[name]} == kept & after.keys()


def test_a_refusal_is_one_line_and_exit_1(tmp_path: Path) -> None:
    KeyDirectory(tmp_path).tenant("acme")
    refused = run(str(tmp_path), "--tenant", "acme")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"error: {tmp_path}/token-acme exists; --force replaces it\n"


def test_more_can_be_added_later(tmp_path: Path) -> None:
    made = KeyDirectory(tmp_path)
    made.executor("a")
    made.tenant("acme")
    before = contents(tmp_path)
    made.executor("b")
    made.tenant("rival")
    after = contents(tmp_path)
    assert {name: after[name] for name in before if name != "tokens"} == {
        name: content for name, content in before.items() if name != "tokens"
    }
    assert len(load_tokens(tmp_path / "tokens")) == 2


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a b", "a\n", "x" * 65])
def test_names_stay_in_the_directory(name: str, tmp_path: Path) -> None:
    made = KeyDirectory(tmp_path / "k", force=True)
    for make in (made.executor, made.tenant, lambda each: made.client(each, 1)):
        with pytest.raises(KeysError):
            make(name)
    assert contents(tmp_path) == {}


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeysError, match="cannot make"):
        KeyDirectory(tmp_path / "file")


def test_certificates_are_for_their_purpose_and_hosts(keys: Path, foreign_keys: Path) -> None:
    """As OpenSSL sees it; the tests of TLS see it through gRPC."""
    assert handshake(keys, "server", keys, "localhost")
    assert handshake(keys, "server", keys, "127.0.0.1")
    assert not handshake(keys, "server", keys, "example.com")
    assert not handshake(keys, "server", foreign_keys, "localhost")
    assert not handshake(keys, "client-caller", keys, "localhost")


def handshake(keys: Path, stem: str, trusted: Path, host: str) -> bool:
    """Whether a client that trusts a CA accepts a server with this certificate under this name."""
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    server_side.load_cert_chain(keys / f"{stem}.crt", keys / f"{stem}.key")
    client_side.load_verify_locations(trusted / "ca.crt")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server, server_hostname=host)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return client.version() is not None
