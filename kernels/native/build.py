"""Compiles the C++ kernels into one shared library, once per source, compiler flags and torch version.

``python -m kernels.native.build`` does so ahead of the first start. The library has a C interface and includes nothing
of torch, so it builds in seconds and loads at once.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_KERNELS = Path(__file__).parent.parent
# No flag may let the compiler reorder or fuse floating-point operations: bits must not depend on what it vectorises.
_COMMON_FLAGS = (
    *("-std=c++20", "-O3", "-pthread", "-fPIC", "-shared"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
    "-mprefer-vector-width=512",
)
_ISA_FLAGS = {
    "amx_bf16": (*_AVX512_FLAGS, "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": _AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma"),
}
_UNFINISHED = "baton-kernels-"  # what a directory is called in which a library is being made
_STALE_SECONDS = 3600.0  # so old, nobody is making one any more: it takes seconds
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # of Linux on x86-64


class BuildError(RuntimeError):
    """There is no library for this machine; the message says why, in one line."""


def choose_isa() -> str:
    """The widest instruction set of this CPU that kernels are written for. Raises ``BuildError`` when it has none."""
    has = torch.cpu.get_capabilities()
    if has.get("avx512_bf16") and has.get("avx512_bw") and has.get("avx512_dq") and has.get("avx512_vl"):
        return "avx512_bf16"
    if has.get("avx2") and has.get("fma3"):
        return "avx2"
    raise BuildError("the CPU has neither AVX512-BF16 nor AVX2")


def choose_amx() -> str:
    """AMX-BF16 beside AVX512-BF16, which this process may use from now on. Raises ``BuildError`` when it may not."""
    if not torch.cpu.get_capabilities().get("amx_bf16") or choose_isa() != "avx512_bf16":
        raise BuildError("the CPU has no AMX-BF16")
    # Linux gives a process room for the tiles' registers on demand (Documentation/arch/x86/xstate.rst).
    if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA):
        raise BuildError("Linux does not let this process use AMX")
    return "amx_bf16"


def build(isa: str) -> Path:
    """Path of the library for ``isa``, compiled unless it lies in the cache. Raises ``BuildError``.

    The cache is ``BATON_KERNEL_CACHE``, by default ``~/.cache/baton/kernels``. Processes that start at once build once.
    """
    path = _cache() / f"{isa}-{_digest(isa)}.so"
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no C++ compiler (g++, or CXX)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _remove_leftovers(path.parent)
                _compile(compiler, isa, path)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error}") from error
    return path


def _cache() -> Path:
    if named := os.environ.get("BATON_KERNEL_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "baton" / "kernels"
    except RuntimeError as error:
        raise BuildError("no home directory for the cache, and no BATON_KERNEL_CACHE") from error


def _sources() -> list[Path]:
    return sorted(_KERNELS.glob("*/*.cpp"))


def _isa_flags(isa: str) -> tuple[str, ...]:
    """Kernels for AVX512-BF16 do without VBMI, which most such CPUs have: int8 weights are read faster with it."""
    has_vbmi = isa != "avx2" and torch.cpu.get_capabilities().get("avx512_vbmi")
    return (*_ISA_FLAGS[isa], "-mavx512vbmi") if has_vbmi else _ISA_FLAGS[isa]


def _digest(isa: str) -> str:
    digest = hashlib.sha256(repr((torch.__version__, _COMMON_FLAGS, _isa_flags(isa))).encode())
    for path in (*_sources(), *sorted(_KERNELS.glob("*/*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache: Path) -> None:
    """What builds left that were killed. Others may be at work there: the lock is one library's."""
    for directory in cache.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):  # somebody else removes it, too
            if time.time() - directory.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(directory)


def _compile(compiler: str, isa: str, path: Path) -> None:
    """Under another name first: a library that exists is whole."""
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=path.parent) as directory:
        partial = Path(directory) / path.name
        command = [compiler, *_COMMON_FLAGS, *_isa_flags(isa), "-o", str(partial), *map(str, _sources())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit {done.returncode}"]
            raise BuildError(f"{compiler} failed: {errors[0]}")
        partial.replace(path)


def main() -> int:
    """Build for this machine and say what happened."""
    began = time.monotonic()
    try:
        isa = choose_isa()
        print(f"building kernels for {isa} ...", flush=True)
        path = build(isa)
    except BuildError as error:
        print(f"no native kernels: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({time.monotonic() - began:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
