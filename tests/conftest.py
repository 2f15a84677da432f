"""What holds for all tests."""

import os
import signal

import pytest

# Settings of the person who runs the tests must not reach the processes that tests start.
for _name in [name for name in os.environ if name.startswith("BATON_")]:
    del os.environ[_name]

# Programs that tests start ask their terminal for its size, and end at Ctrl-C, wherever the tests themselves run.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton decides when it is first imported whether kernels are compiled or interpreted; there need be no GPU here.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not _has_cuda():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
