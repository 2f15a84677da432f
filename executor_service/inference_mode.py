"""Torch's inference mode for functions that a loop calls many times."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def in_inference_mode(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """``function`` in inference mode, like torch's own decorator; but it is entered only where the caller has not.

    Entering takes some 50 us while other work has the caches, which a step of a few milliseconds feels.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run
