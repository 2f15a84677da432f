"""TLS and mutual TLS at the gRPC port, and certificates that are replaced while it is open."""

import os
import shutil
from pathlib import Path

import pytest

from baton import AsyncClient, Credentials, CredentialsError, UnavailableError
from baton.keys import KeyDirectory
from scheduler_service.api.credentials import CertificateSource
from scheduler_service.tls import TlsError, TlsFiles
from tests.api.conftest import Serve


def tls_settings(keys: Path, *, mutual: bool) -> dict[str, Path]:
    settings = {"tls_cert": keys / "server.crt", "tls_key": keys / "server.key"}
    return settings | {"tls_client_ca": keys / "ca.crt"} if mutual else settings


def caller(keys: Path, ca: Path | None = None) -> Credentials:
    return Credentials(ca=(ca or keys) / "ca.crt", cert=keys / "client-caller.crt", key=keys / "client-caller.key")


async def is_served(port: int, credentials: Credentials) -> bool:
    """Whether a request is served; the only other way out is that no connection came about."""
    async with AsyncClient(f"127.0.0.1:{port}", credentials=credentials) as client:
        try:
            return len((await client.generate([1, 2], max_tokens=2, ignore_eos=True, timeout=30)).token_ids) == 2
        except UnavailableError:
            return False


async def test_callers_need_the_right_ca(serve: Serve, keys: Path, foreign_keys: Path) -> None:
    port = (await serve(attached=False, **tls_settings(keys, mutual=False))).server.port
    assert await is_served(port, Credentials(ca=keys / "ca.crt"))
    assert not await is_served(port, Credentials(ca=foreign_keys / "ca.crt"))
    assert not await is_served(port, Credentials(tls=True))
    assert not await is_served(port, Credentials())


async def test_mutual_tls_asks_callers_for_a_certificate_of_the_ca(
    serve: Serve, keys: Path, foreign_keys: Path
) -> None:
    port = (await serve(attached=False, **tls_settings(keys, mutual=True))).server.port
    assert await is_served(port, caller(keys))
    assert not await is_served(port, Credentials(ca=keys / "ca.crt"))
    assert not await is_served(port, caller(foreign_keys, ca=keys))


@pytest.mark.parametrize(
    ("case", "words"),
    [("ca", "not signed by a CA"), ("certificate", "hung up"), ("plaintext", "hung up"), ("host", "another host")],
)
async def test_why_there_is_no_connection(case: str, words: str, serve: Serve, keys: Path, foreign_keys: Path) -> None:
    host = "127.0.0.2" if case == "host" else "127.0.0.1"
    port = (await serve(attached=False, host=host, **tls_settings(keys, mutual=True))).server.port
    credentials = {
        "ca": caller(keys, ca=foreign_keys),
        "certificate": Credentials(ca=keys / "ca.crt"),
        "plaintext": Credentials(),
        "host": caller(keys),
    }[case]
    async with AsyncClient(f"{host}:{port}", credentials=credentials) as client:
        with pytest.raises(UnavailableError, match=words):
            await client.model_info(timeout=30)


async def test_a_scheduler_without_tls(serve: Serve, keys: Path) -> None:
    port = (await serve(attached=False)).server.port
    async with AsyncClient(f"127.0.0.1:{port}", credentials=Credentials(ca=keys / "ca.crt")) as client:
        with pytest.raises(UnavailableError, match="does not speak TLS"):
            await client.model_info(timeout=30)


async def test_a_token_goes_with_tls(serve: Serve, keys: Path) -> None:
    port = (await serve(attached=False, tokens=keys / "tokens", **tls_settings(keys, mutual=False))).server.port
    token = (keys / "token-acme").read_text().strip()
    assert await is_served(port, Credentials(ca=keys / "ca.crt", token=token))


async def test_a_replaced_certificate_serves_new_connections(
    serve: Serve, keys: Path, foreign_keys: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(keys, tmp_path / "mine"))
    port = (await serve(attached=False, **tls_settings(mine, mutual=False))).server.port
    old, new = Credentials(ca=keys / "ca.crt"), Credentials(ca=foreign_keys / "ca.crt")
    async with AsyncClient(f"127.0.0.1:{port}", credentials=old) as before:
        stream = before.stream([1, 2], max_tokens=400, ignore_eos=True)
        await anext(stream)
        for name in ("server.crt", "server.key"):
            shutil.copy(foreign_keys / name, mine / name)
        assert await is_served(port, new)
        assert not await is_served(port, old)
        assert len((await stream.result()).token_ids) == 400


def test_files_that_do_not_fit_together_change_nothing(
    keys: Path, foreign_keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Path(shutil.copytree(keys, tmp_path / "mine"))
    source = CertificateSource(TlsFiles(mine / "server.crt", mine / "server.key", mine / "ca.crt"))
    assert source.changed() is None
    shutil.copy(foreign_keys / "server.crt", mine / "server.crt")  # half of a rotation
    assert source.changed() is None
    assert source.changed() is None
    assert caplog.text.count("stays as it was") == 1
    shutil.copy(foreign_keys / "server.key", mine / "server.key")
    os.utime(mine / "server.key", (1, 1))
    assert source.changed() is not None
    assert source.changed() is None


@pytest.mark.parametrize("broken", ["server.crt", "server.key", "ca.crt"])
@pytest.mark.parametrize("how", ["missing", "empty", "foreign"])
def test_unusable_files_are_errors(broken: str, how: str, keys: Path, foreign_keys: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(keys, tmp_path / "mine"))
    files = TlsFiles(mine / "server.crt", mine / "server.key", mine / "ca.crt")
    match how:
        case "missing":
            (mine / broken).unlink()
        case "empty":
            (mine / broken).write_text("")
        case "foreign":
            shutil.copy(foreign_keys / broken, mine / broken)
    if (broken, how) == ("ca.crt", "foreign"):
        files.load()  # anybody's callers may be let in
        return
    with pytest.raises(TlsError) as caught:
        files.load()
    assert "\n" not in str(caught.value)


def test_a_client_says_what_is_wrong_with_its_files(keys: Path, foreign_keys: Path) -> None:
    for credentials in (
        Credentials(ca=keys / "nothing"),
        Credentials(ca=keys / "tokens"),
        Credentials(cert=keys / "client-caller.crt"),
        Credentials(cert=keys / "client-caller.crt", key=foreign_keys / "client-caller.key"),
    ):
        with pytest.raises(CredentialsError):
            credentials.read()


def test_a_token_does_not_leave_the_machine_in_plaintext() -> None:
    credentials = Credentials(token="x" * 20)
    for here in ("127.0.0.1:50051", "localhost:1", "[::1]:1", "unix:/run/baton"):
        assert credentials.metadata(here)
    for elsewhere in ("scheduler:50051", "10.0.0.1:1", "dns:///127.0.0.1.example.com:1", "[2001:db8::1]:1"):
        with pytest.raises(CredentialsError, match="plaintext"):
            credentials.metadata(elsewhere)
        assert Credentials(token="x" * 20, tls=True).metadata(elsewhere)
        assert Credentials(token="x" * 20, insecure=True).metadata(elsewhere)
    assert "x" * 20 not in repr(credentials)


def test_credentials_from_the_environment(keys: Path) -> None:
    assert Credentials.from_environment({}) == Credentials()
    file = keys / "token-acme"
    given = Credentials.from_environment({"BATON_TLS_CA": "ca", "BATON_TOKEN_FILE": str(file), "BATON_TLS": "1"})
    assert given == Credentials(tls=True, ca=Path("ca"), token=file.read_text().strip())
    both = {"BATON_TOKEN": "t", "BATON_TOKEN_FILE": "/nowhere", "BATON_TLS": "0", "BATON_INSECURE": "1"}
    assert Credentials.from_environment(both) == Credentials(token="t", insecure=True)
    with pytest.raises(CredentialsError, match="cannot read /nowhere"):
        Credentials.from_environment({"BATON_TOKEN_FILE": "/nowhere"})


def test_the_authority_is_kept_and_its_certificates_are_for_their_purpose(keys: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(keys, tmp_path / "mine"))
    before = (mine / "ca.crt").read_bytes()
    KeyDirectory(mine).client("another", days=1)
    assert (mine / "ca.crt").read_bytes() == before
