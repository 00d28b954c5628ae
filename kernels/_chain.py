"""Two walks over a tensor in one launch, the second close behind the first.

The tensor is cut into pieces and these into chunks. The first walk sums over the chunks of a piece, the second needs
the piece's sum; what both read is in the cache when the second comes by. With a launch for each walk all of a large
tensor would lie between them, and be read from memory twice.

Programs take numbers as they start, so that whatever a program waits for has started before it, and ends. The
``counters``, zero at first, are the next number and, for each piece, how many of its chunks are summed; one more when
its sum is there. Everything is added in a fixed order, whatever the programs' own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl


@jit
def take_turn(counters, chunks, lead):
    """Which chunk (counted over all pieces) the program walks through, and whether on the first walk.

    ``chunks`` of them in all. The first walk has ``lead`` before the second begins; from then on they take turns.
    """
    turn = tl.atomic_add(counters, 1, sem="relaxed")
    behind, rest = turn - lead, chunks - lead
    both = (behind >= 0) & (behind < 2 * rest)
    first = (behind < 0) | (both & (behind % 2 == 0))
    second = tl.where(both, behind // 2, behind - rest)
    return tl.where(behind < 0, turn, tl.where(first, lead + behind // 2, second)), first


@jit
def is_last(counters, piece, chunks):
    """Said once a chunk's sum is stored: whether those of all ``chunks`` of the piece are, for the program to add."""
    tl.debug_barrier()  # one thread speaks for all
    return tl.atomic_add(counters + 1 + piece, 1, sem="acq_rel") == chunks - 1


@jit
def tell(counters, piece):
    """The piece's sum is stored."""
    tl.debug_barrier()
    tl.atomic_add(counters + 1 + piece, 1, sem="release")


@jit
def wait_for(counters, piece, chunks):
    """Until the piece's sum is stored, which loads must then take from where all multiprocessors see it."""
    while tl.atomic_add(counters + 1 + piece, 0, sem="acquire") <= chunks:
        pass
    tl.debug_barrier()


def new_counters(x: Tensor, pieces: int) -> Tensor:
    """For a launch."""
    return torch.zeros(1 + pieces, dtype=torch.int32, device=x.device)


def lead_of(chunks: int, pieces: int, ahead: int) -> int:
    """By how many chunks the first walk leads: a piece, and ``ahead`` more, about as many as run at a time."""
    return min(chunks * pieces, chunks + ahead)
