"""Loads a checkpoint's safetensors files straight into a model's parameters."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor_service.models import CausalLM, UnsupportedCheckpointError, load_config

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_NAMES_SHOWN = 5
_MAPPED_BYTES = 1 << 26  # of a file that are mapped at once, or a single tensor if that is more


def load_model(checkpoint: Path, device: torch.device, dtype: torch.dtype | None) -> CausalLM:
    """Build the model of ``checkpoint`` on ``device`` and fill it; ``dtype`` None takes the one config.json names.

    Files are memory-mapped piece by piece and copied tensor by tensor into place, so no second copy of the weights is
    held, not even in pages of the files.
    Raises ``UnsupportedCheckpointError`` when config.json asks for what is not implemented, when files are missing or
    damaged, or when tensors are missing, unexpected or of another shape.
    """
    config = load_config(checkpoint)
    files = _locate_tensors(checkpoint)
    model = CausalLM(config, device, dtype or config.dtype)
    targets = dict(model.checkpoint_tensors())
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = {name for stored in files.values() for name in stored if not name.endswith(".rotary_emb.inv_freq")}
    _refuse("lacks", targets.keys() - names)
    _refuse("has unexpected", names - targets.keys() - ignored)
    for path, stored in files.items():
        for part in _parts({name: targets[name] for name in stored if name in targets}):
            _copy(path, part)
    return model


def _locate_tensors(checkpoint: Path) -> dict[Path, list[str]]:
    """Names of the tensors in each weight file."""
    index = checkpoint / _INDEX_FILE
    if not index.exists():
        path = checkpoint / _SINGLE_FILE
        if not path.exists():
            raise UnsupportedCheckpointError(f"{checkpoint} has neither {_SINGLE_FILE} nor {_INDEX_FILE}")
        return {path: _stored_names(path)}
    files = defaultdict(list)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise UnsupportedCheckpointError(f"{index} is not an index of weights: {error!r}") from error
    for name, file in weight_map.items():
        files[checkpoint / file].append(name)
    return dict(files)


def _stored_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UnsupportedCheckpointError(f"cannot read {path}: {error}") from error


def _refuse(complaint: str, names: Iterable[str]) -> None:
    if listed := sorted(names):
        more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
        shown = ", ".join(listed[:_NAMES_SHOWN])
        raise UnsupportedCheckpointError(f"the checkpoint {complaint} tensors: {shown}{more}")


def _parts(targets: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Cut ``targets`` into parts of about ``_MAPPED_BYTES``."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, target in targets.items():
        if part and size + target.nbytes > _MAPPED_BYTES:
            yield part
            part, size = {}, 0
        part[name] = target
        size += target.nbytes
    yield part


def _copy(path: Path, targets: dict[str, Tensor]) -> None:
    """Fill ``targets`` from a file; pages of it that were read are given up at the end."""
    try:
        with safe_open(path, framework="pt") as file:
            for name, target in targets.items():
                source = file.get_tensor(name)
                if source.shape != target.shape:
                    raise UnsupportedCheckpointError(
                        f"{name} is {list(source.shape)}, config.json says {list(target.shape)}"
                    )
                target.copy_(source)
    except (OSError, SafetensorError) as error:
        raise UnsupportedCheckpointError(f"cannot read {path}: {error}") from error
