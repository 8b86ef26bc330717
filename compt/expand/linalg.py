"""Linear algebra whose results are the same for every number of threads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's linear algebra on one thread: how it splits sums over threads would show in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def complete(block: Tensor, own: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix like `own` [m, n] with `block` at [rows, columns] and an orthonormal complement to it; float64 all.

    Where rows grow, old rows are zero in new columns, and new rows are orthonormal to each other and to the old ones:
    as many as there is room for, then as many again, from other draws. Where columns alone grow, the same for the
    transpose. New rows are made from those of `own`; their length is the block's root mean square singular value. Where
    there is no room at all, those of `own` stay. `rows` and `columns` are int64 positions.
    """
    if len(rows) == len(own):
        return complete(block.T, own.T, columns, rows).T
    result = own.clone()
    result[rows] = 0.0
    result[rows[:, None], columns] = block
    free = torch.ones(len(own), dtype=torch.bool)
    free[rows] = False
    new, length = free.nonzero()[:, 0], _root_mean_square(block)
    with one_thread():
        right = _row_space(block)
        room = own.shape[1] - len(right)
        basis = own.new_zeros((len(right), own.shape[1]))
        basis[:, columns] = right
        for part in new.split(room) if room else ():
            # Householder: the columns behind those of the basis are orthonormal to it, whatever was drawn.
            both = torch.cat([basis, own[part]]).T
            result[part] = torch.linalg.qr(both).Q[:, len(basis) :].T * length
    return result


def _root_mean_square(block: Tensor) -> float:
    """Of the singular values; by numpy, whose sums do not depend on threads."""
    squares = block.contiguous().numpy() ** 2
    return math.sqrt(float(squares.sum()) / min(block.shape))


def _row_space(block: Tensor) -> Tensor:
    """Orthonormal rows that span those of `block`: [rank, columns]."""
    _, values, right = torch.linalg.svd(block, full_matrices=False)
    least = float(values[0]) * max(block.shape) * torch.finfo(block.dtype).eps
    rank = int((values > least).sum())
    return torch.as_tensor(right[:rank])
