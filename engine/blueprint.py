"""A model before it has weights: its networks on the meta device, each beside the tensors that will fill it.

Everything that can be wrong with a checkpoint's names and shapes is found here, before memory is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, MissingDependency

LISTED = 20
"""Names of each kind that an error spells out; the rest is counted."""


def same_name(name: str) -> str:
    return name


@dataclass
class Part:
    """One network and its tensors."""

    name: str
    """``unet``, ``vae``, ``text`` or ``vision``."""
    wrapper: Any
    """The module that the engine calls (each kind has attributes of its own, hence the type)."""
    network: Any
    """The module in it, or itself, whose parameters the tensors are; on meta until :func:`fill`."""
    tensors: Mapping[str, Tensor]
    """By the network's own names; anything else in here is an extra."""
    file_name: Callable[[str], str] = same_name
    """The name that the user's file has for one of the network's."""


@dataclass
class Layout:
    """The networks that a checkpoint's tensors make, and what keeps others from being laid out."""

    parts: dict[str, Part] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    extra: tuple[str, ...] = ()
    """Names that belong to no network."""

    def attempt(self, build: Callable[[], Part]) -> None:
        """Add a part; if its sizes cannot be told, that is one complaint among others."""
        try:
            part = build()
        except MissingDependency:
            raise
        except InputError as error:
            self.complaints.append(str(error))
        else:
            self.parts[part.name] = part


@dataclass(frozen=True)
class Mismatch:
    """Where tensors and network disagree, in the words of the file."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    wrong: tuple[str, ...]
    """``name: [shape in the file], must be [shape]``."""

    def __len__(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.wrong)


def compare(part: Part) -> Mismatch:
    """Names and shapes of the part's tensors against its network."""
    expected = {name: tensor.shape for name, tensor in part.network.state_dict().items()}
    missing = [name for name in expected if name not in part.tensors]
    extra = [name for name in part.tensors if name not in expected]
    wrong = []
    for name, shape in expected.items():
        tensor = part.tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            wrong.append(f"{part.file_name(name)}: {list(tensor.shape)}, must be {list(shape)}")
        elif not tensor.is_floating_point():
            wrong.append(
                f"{part.file_name(name)}: {str(tensor.dtype).removeprefix('torch.')}, must be floating"
            )
    return Mismatch(
        tuple(dict.fromkeys(map(part.file_name, missing))),
        tuple(dict.fromkeys(map(part.file_name, extra))),
        tuple(wrong),
    )


def check(where: str, layout: Layout) -> None:
    """Raise one :class:`InputError` that lists everything in which ``where`` and its networks disagree."""
    found = [compare(part) for part in layout.parts.values()]
    lists = {
        "missing": [name for one in found for name in one.missing],
        "extra": [*(name for one in found for name in one.extra), *layout.extra],
        "wrongly shaped": [name for one in found for name in one.wrong],
    }
    complaints = list(layout.complaints)
    for kind, names in lists.items():
        if names:
            complaints.append(f"{kind} tensors ({len(names)}): {spelt(names)}")
    if complaints:
        raise InputError(
            f"{where}: not the weights of an ImageDream or MVDream model. {'; '.join(complaints)}. "
            "Give the complete, unchanged checkpoint"
        )


def spelt(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def fill(part: Part, device: torch.device, dtype: torch.dtype, where: str) -> None:
    """Give the network its weights: copies on ``device`` in ``dtype``, evaluation mode, no gradients.

    Copies, so that neither the file nor a caller's state dict stays in use. Raises :class:`InputError` for
    NaN and infinite weights, and for weights beyond the range of ``dtype``; names the tensors.
    """
    filled: dict[str, Tensor] = {}
    finite: dict[str, Tensor] = {}
    for name in part.network.state_dict():
        filled[name] = part.tensors[name].to(device=device, dtype=dtype, copy=True).contiguous()
        finite[name] = filled[name].isfinite().all()
    # One look for all of them: on a GPU each look by itself would wait for the copies.
    if not torch.stack(list(finite.values())).all():
        _refuse(where, part, dtype, [name for name, good in finite.items() if not good])
    part.network.load_state_dict(filled, assign=True)
    for name, buffer in list(part.network.named_buffers()):
        if buffer.is_meta:  # not in any state dict: the positions 0, 1, ... of CLIP's embeddings
            owner, _, own = name.rpartition(".")
            assert own == "position_ids", name
            positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            part.network.get_submodule(owner).register_buffer(own, positions, persistent=False)
    part.wrapper.requires_grad_(False).eval()


def _refuse(where: str, part: Part, dtype: torch.dtype, names: list[str]) -> None:
    broken = [name for name in names if not part.tensors[name].isfinite().all()]
    listed = spelt([part.file_name(name) for name in broken or names])
    if broken:
        raise InputError(
            f"{where}: NaN or infinite weights in the {part.name} ({len(broken)} tensors): {listed}; "
            "the file is damaged or its training diverged; give a sound checkpoint"
        )
    raise InputError(
        f"{where}: weights of the {part.name} ({len(names)} tensors) exceed the range of "
        f"{str(dtype).removeprefix('torch.')}: {listed}; load the model with dtype float32 or bfloat16"
    )
