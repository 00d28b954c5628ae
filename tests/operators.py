"""Which operators a piece of work runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

REARRANGING = ("clone", "copy_", "_to_copy", "contiguous")


class Operators(TorchDispatchMode):
    """Counts the operators that run inside it, by name without namespace and overload."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def rearranging(self) -> dict[str, int]:
        """Operators that only change where numbers lie or how they are stored."""
        return {name: self.others[name] for name in REARRANGING if self.others[name]}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        (self.ours if namespace == "imagedream_rt" else self.others)[name] += 1
        return function(*args, **(kwargs or {}))
