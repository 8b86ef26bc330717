"""Linear algebra whose results do not depend on the number of threads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's linear algebra on one thread. Splitting sums over threads would change the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def complete(block: Tensor, own: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix [m, n] with `block` at [rows, columns] and an orthonormal complement of it, drawn from `own` [m, n].

    Everything is float64; `rows` and `columns` are int64 positions. Where rows grow, old rows are zero in new columns.
    New rows are orthonormal to each other and to the old ones, times the root mean square singular value of the block.
    If the complement has fewer dimensions than there are new rows, further rows form another orthonormal set; if it has
    none, the rows of `own` stay. Where only columns grow, the same is done to the transpose.
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
            # QR by Householder reflections: the columns of Q behind the basis are orthonormal to it for any draw.
            both = torch.cat([basis, own[part]]).T
            result[part] = torch.linalg.qr(both).Q[:, len(basis) :].T * length
    return result


def _root_mean_square(block: Tensor) -> float:
    """Root mean square of the singular values. numpy's sums do not depend on the number of threads."""
    squares = block.contiguous().numpy() ** 2
    return math.sqrt(float(squares.sum()) / min(block.shape))


def _row_space(block: Tensor) -> Tensor:
    """An orthonormal basis of the row space of `block`: [rank, columns]."""
    _, values, right = torch.linalg.svd(block, full_matrices=False)
    least = float(values[0]) * max(block.shape) * torch.finfo(block.dtype).eps
    rank = int((values > least).sum())
    return torch.as_tensor(right[:rank])
