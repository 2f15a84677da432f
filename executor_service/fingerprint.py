"""Names for what must be equal on two executors for a stream to continue on the other one bit by bit."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import kernels
from kernels.linear import Quantization
from kernels.native.library import selection

_CODE_SUFFIXES = {".py", ".cpp", ".h", ".cu"}
_CODE_PARTS = (
    "batch_dimensions.py",
    "context.py",
    "layers",
    "metadata",
    "model_runner.py",
    "models",
    "recorded_steps.py",
    "sampler.py",
)
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000


def model_fingerprint(checkpoint: Path, quantization: Quantization = "none") -> str:
    """SHA-256, hex, over the configuration and the weights' headers (not the weights: that would read them all).

    Hashed: config.json's bytes; then for each \\*.safetensors in order of name: its name (UTF-8), its size in bytes
    (decimal ASCII), its header's bytes (JSON: names, dtypes, shapes, offsets). Each item is preceded by its length as
    8 bytes little-endian. Weights quantised at load are other weights: a last item says how, if they are.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not safetensors.
    """
    digest = hashlib.sha256()
    _add(digest, (checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        _add(digest, path.name.encode())
        _add(digest, str(path.stat().st_size).encode())
        _add(digest, _safetensors_header(path))
    if quantization != "none":
        _add(digest, quantization.encode())
    return digest.hexdigest()


def kernel_fingerprint(device: torch.device, dtype: torch.dtype, block_size: int, attention: str) -> str:
    """What the arithmetic depends on besides the weights, readable; the same for every number of threads.

    ``attention`` names the backend in use, and the exact mode if it is on.
    """
    parts = {
        "torch": torch.__version__,
        "device": _capability(device),
        "dtype": str(dtype).removeprefix("torch."),
        "block": str(block_size),
        "kernels": selection(torch.empty(0, device=device, dtype=dtype)).partition(" (")[0].replace(" ", ":"),
        "attention": attention,
        "libc": "".join(platform.libc_ver()),  # logarithms and angles are its own
        "llguidance": version("llguidance"),
        "code": _code_digest(),
    }
    return " ".join(f"{key}={value}" for key, value in parts.items())


def _capability(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cpu:{torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}:cuda{torch.version.cuda}"


def _code_digest() -> str:
    """Over the sources of what computes: two builds that compute differently differ here."""
    digest = hashlib.sha256()
    service = Path(__file__).parent
    roots = [Path(kernels.__path__[0]), *(service / name for name in _CODE_PARTS)]
    for root in roots:
        found = root.rglob("*") if root.is_dir() else [root]
        for path in sorted(path for path in found if path.suffix in _CODE_SUFFIXES):
            _add(digest, path.name.encode())
            _add(digest, path.read_bytes())
    return digest.hexdigest()[:16]


def _safetensors_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        json.loads(header)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file") from error
    return header


def _add(digest: "hashlib._Hash", item: bytes) -> None:
    digest.update(len(item).to_bytes(8, "little"))
    digest.update(item)
