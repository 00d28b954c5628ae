"""Triton's interpreter with recent versions of NumPy."""

from __future__ import annotations

import contextlib
from typing import Any


def take_scalars_as_loop_bounds() -> None:
    """Let kernels that are interpreted use their scalars in ``range``.

    Triton 3.6 keeps a scalar as an array of one element and leaves it to NumPy to make a number of it, which
    NumPy 2.4 refuses to do.
    """
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patch_tensor(tensor: Any, *scope: Any) -> None:
            patch(tensor, *scope)
            tensor.__index__ = lambda self: self.handle.data.item()

        interpreter._patch_lang_tensor = patch_tensor
