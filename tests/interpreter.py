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


def round_to_e4m3_as_gpus_do(monkeypatch: Any) -> None:
    """Let interpreted kernels round float32 to the nearest number of e4m3, and to 448 beyond the last.

    Triton 3.6's own conversion loses the carry into the exponent, and wraps round where a GPU saturates.
    """
    import torch
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return convert(data, source, target, rounding)
        rounded = torch.from_numpy(data.copy()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
