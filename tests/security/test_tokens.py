"""Token files: what they may say, and that they may change."""

import hashlib
import os
from pathlib import Path

import pytest

from scheduler_service.api.auth import TokenFile
from scheduler_service.tokens import TokenFileError, load_tokens

ACME, RIVAL = "acme-token-0123456789", "rival-token-0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"acme:{ACME}\n")
    return path


def test_plain_and_hashed_lines_comments_and_several_tokens_of_a_tenant(file: Path) -> None:
    digest = hashlib.sha256(RIVAL.encode()).hexdigest()
    file.write_text(f"# tenants\n\n  acme : {ACME} \nacme:{ACME}-new\nrival:sha256={digest.upper()}\r\n")
    tokens = load_tokens(file)
    assert len(tokens) == 3
    assert [tokens.tenant(token) for token in (ACME, f"{ACME}-new", RIVAL)] == ["acme", "acme", "rival"]


@pytest.mark.parametrize("token", ["", ACME[:-1], f"{ACME}x", digest := hashlib.sha256(ACME.encode()).hexdigest(),
                                   f"sha256={digest}", "é" * 20, "\udcff" * 20, "x" * 2000])  # fmt: skip
def test_anything_else_is_nobodys(file: Path, token: str) -> None:
    assert load_tokens(file).tenant(token) is None


@pytest.mark.parametrize(
    "line",
    [
        ACME,
        f":{ACME}",
        f"../x:{ACME}",
        f"{'t' * 65}:{ACME}",
        "acme:short",
        "acme:",
        f"acme:{ACME} {ACME}",
        "acme:" + "x" * 2000,
        "acme:sha256=1234",
        "acme:pässwort-pässwort",
    ],
)
def test_malformed_lines_are_errors_that_tell_no_token(file: Path, line: str) -> None:
    file.write_text(f"# one\n{line}\n")
    with pytest.raises(TokenFileError, match=rf"{file}:2: ") as caught:
        load_tokens(file)
    assert ACME not in str(caught.value)


def test_one_token_of_two_tenants_is_an_error(file: Path) -> None:
    file.write_text(f"acme:{ACME}\nrival:{ACME}\n")
    with pytest.raises(TokenFileError, match="another tenant's"):
        load_tokens(file)


def test_missing_and_huge_files_are_errors(file: Path) -> None:
    file.write_text("#" * 2_000_000)
    with pytest.raises(TokenFileError, match="larger"):
        load_tokens(file)
    with pytest.raises(TokenFileError, match="cannot read"):
        load_tokens(file.parent / "nothing")


def test_a_changed_file_is_read_again_but_not_at_every_call(file: Path) -> None:
    now = 0.0
    tokens = TokenFile(file, clock=lambda: now)
    file.write_text(f"rival:{RIVAL}\n")
    os.utime(file, (1, 1))
    assert (tokens.tenant(ACME), tokens.tenant(RIVAL)) == ("acme", None)
    now = 1.5
    assert (tokens.tenant(ACME), tokens.tenant(RIVAL)) == (None, "rival")


def test_a_file_that_turns_bad_or_vanishes_changes_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    tokens = TokenFile(file, clock=lambda: now)
    file.write_text("nonsense\n")
    now = 2.0
    assert tokens.tenant(ACME) == "acme"
    assert f"{file}:1" in caplog.text
    file.unlink()
    now = 4.0
    assert tokens.tenant(ACME) == "acme"
    file.write_text(f"rival:{RIVAL}\n")
    now = 6.0
    assert (tokens.tenant(ACME), tokens.tenant(RIVAL)) == (None, "rival")
