"""Finding, building and loading the native kernels, and doing without them."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.linear import PackedMatrix, pack
from kernels.native import build, library

ISAS = ["avx512_bf16", "avx2"]


def use_isa(patch: pytest.MonkeyPatch, isa: str) -> Iterator[None]:
    """Run with kernels for ``isa``; skips, saying why, where they cannot be had."""
    try:
        best = build.choose_isa()
    except build.BuildError as error:
        pytest.skip(str(error))
    if ISAS.index(isa) < ISAS.index(best):
        pytest.skip(f"the CPU lacks {isa}")
    patch.setattr(library, "choose_isa", lambda: isa)
    patch.delenv("BATON_KERNELS", raising=False)
    forget()
    if not library.available():
        why = library.selection(torch.zeros(1, dtype=torch.bfloat16))
        assert "failed" not in why, why  # the compiler is there, and does not take our code
        pytest.skip(why)
    yield
    forget()


def forget() -> None:
    """Load the library anew at its next use."""
    library._load.cache_clear()
    library._resolve.cache_clear()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def describe() -> str:
    return library.selection(torch.zeros(1, dtype=torch.bfloat16))


def test_reference_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_KERNELS", "reference")
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    assert pack(weight) is weight
    assert describe() == "reference (BATON_KERNELS)"


def test_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_KERNELS", "fast")
    with pytest.raises(ValueError, match="native, amx, reference or triton, not 'fast'"):
        library.available()


def test_amx_on_a_cpu_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = torch.cpu.get_capabilities() | {"amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setenv("BATON_KERNELS", "amx")
    with pytest.raises(build.BuildError, match="no AMX-BF16"):
        library.available()


@pytest.mark.parametrize("isa", ISAS)
def test_native(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    for _ in use_isa(monkeypatch, isa):
        assert describe() == f"native {isa}"
        assert isinstance(pack(torch.ones(3, 4, dtype=torch.bfloat16)), PackedMatrix)
        assert library.selection(torch.zeros(1)) == "reference (cpu float32)"


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BATON_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.delenv("BATON_KERNELS", raising=False)
    monkeypatch.setattr(library, "choose_isa", lambda: "avx2")
    return tmp_path / "kernels"


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "\n" not in record.getMessage()
    return record.getMessage()


@pytest.mark.usefixtures("no_cache")
def test_no_compiler_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not library.available()
    assert not library.available()
    assert describe() == "reference (no C++ compiler (g++, or CXX))"
    assert "no C++ compiler" in one_warning(caplog)


def test_a_failing_build_is_one_warning(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: something odd' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert not library.available()
    assert "x.cpp:1: error: something odd" in one_warning(caplog)
    assert not list(no_cache.glob("*.so"))
    forget()
    monkeypatch.setenv("BATON_KERNELS", "native")
    with pytest.raises(build.BuildError, match="something odd"):
        library.available()


@pytest.mark.usefixtures("no_cache")
def test_a_cpu_without_vectors_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sse2": True})
    monkeypatch.setattr(library, "choose_isa", build.choose_isa)
    assert not library.available()
    assert "neither AVX512-BF16 nor AVX2" in one_warning(caplog)


def test_starts_at_once_build_once(no_cache: Path, tmp_path: Path) -> None:
    """Three processes; a compiler that counts its calls, and is slow enough for them to meet."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\necho call >> {calls}\nsleep 1\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n'
    )
    compiler.chmod(0o755)
    code = "from kernels.native.build import build; print(build('avx2'))"
    environment = {**os.environ, "CXX": str(compiler)}
    starting = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in starting}
    assert [process.returncode for process in starting] == [0, 0, 0]
    (path,) = paths
    assert Path(path).read_text() == "built\n"
    assert calls.read_text() == "call\n"
    assert list(no_cache.glob("*.so")) == [Path(path)]


def test_what_killed_builds_leave_is_removed(no_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build whose process is killed, then, an hour later, one that is not."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nkill -9 $PPID\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    code = "from kernels.native.build import build; build('avx2')"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == -signal.SIGKILL
    (left,) = (path for path in no_cache.iterdir() if path.is_dir())
    recent, strange = no_cache / f"{left.name}-recent", no_cache / "tmp-of-others"
    for directory in (recent, strange):
        directory.mkdir()
    for directory in (left, strange):
        os.utime(directory, (0, 0))
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    built = build.build("avx2")
    assert set(no_cache.iterdir()) == {built, built.with_suffix(".lock"), recent, strange}
