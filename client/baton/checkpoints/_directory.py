"""Writing a checkpoint directory whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["checkpoint_directory", "write_json"]


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def checkpoint_directory(out: Path) -> Iterator[Path]:
    """Give a new directory to fill, which becomes `out` if the block succeeds and is removed if it does not.

    An earlier checkpoint at `out` is replaced.

    Raises:
        FileExistsError: on entry, if `out` holds anything but a checkpoint.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file())):
        raise FileExistsError(f"{out} exists and is not a checkpoint directory")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
