"""The losses by tiles, as Triton kernels: their memory grows with the batch, not with its square (`engine.loss_chunk`).

A program holds one tile of the similarities, of some rows and some columns, and never writes it to memory. The softmax
losses take two passes: the first finds the logarithm of each softmax's denominator, the second computes the tiles again
and multiplies their gradient with the features. A rank computes the whole gradient of its own features: from its own
images with all captions, and from its own captions with all images. So ranks exchange denominators, two numbers or so a
caption, instead of the gradients of all features.

Rows and columns are features of length one, fp32, contiguous. Products are fp32 on tensor cores ("tf32x3": three
products of TF32, which lose about what fp32 loses).
"""

# Triton compiles the kernels from their source and has no types for them.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from compt.dist.collectives import gather_with_grad, rank

_TILE = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}
"""Rows and columns of a tile, and the numbers of each feature that are multiplied at a time."""
_WARPS = 8
"""Of 32 threads, for a program. With 4, the compiled kernels need more registers than there are (docs/log.md)."""
_PROGRAMS = 512
"""Few rows are shared among about so many programs: each takes a part of the columns."""


@triton.jit
def _products(
    rows, columns, row, column, n_rows, n_columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]: products of the rows and columns at these positions; zero beyond the last."""
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = (row < n_rows)[:, None] & (depth < WIDTH)[None, :]
        right = (column < n_columns)[None, :] & (depth < WIDTH)[:, None]
        # 64-bit places: all captions of many ranks have more than 2^31 numbers.
        a = tl.load(rows + row.to(tl.int64)[:, None] * WIDTH + depth[None, :], mask=left, other=0.0)
        b = tl.load(columns + column.to(tl.int64)[None, :] * WIDTH + depth[:, None], mask=right, other=0.0)
        found = tl.dot(a, b, found, input_precision="tf32x3")
    return found


@triton.jit
def _softmax_kernel(
    rows, columns, scale, out, n_rows, n_columns, first,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of each row and group of columns: log of the softmax's denominator, expected logit, sum of the right logits.

    Column c is in group c % GROUPS. It is right for a row if both belong to one image: PER_ROW rows and PER_COLUMN
    columns are one image, and the first row's image is `first`. Program (i, g, p) takes SPAN columns of group g from
    column p * SPAN on and writes to out [p, 3, n_rows, GROUPS].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, part = tl.program_id(1), tl.program_id(2)
    factor = tl.load(scale)
    image = first + row // PER_ROW
    members = n_columns // GROUPS
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    expected = tl.zeros((ROWS,), tl.float32)
    right = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, SPAN, COLUMNS):
        member = part * SPAN + tile + tl.arange(0, COLUMNS)
        column = member * GROUPS + group
        there = (member < members)[None, :]
        logits = factor * _products(rows, columns, row, column, n_rows, n_columns, WIDTH, ROWS, COLUMNS, DEPTH)
        highest = tl.maximum(most, tl.max(tl.where(there, logits, float("-inf")), 1))
        # Sums so far are relative to the largest logit so far.
        before = tl.exp(most - highest)
        weights = tl.where(there, tl.exp(logits - highest[:, None]), 0.0)
        total = total * before + tl.sum(weights, 1)
        expected = expected * before + tl.sum(weights * logits, 1)
        own = ((column // PER_COLUMN)[None, :] == image[:, None]) & there
        right += tl.sum(tl.where(own, logits, 0.0), 1)
        most = highest
    place = out + part * 3 * n_rows * GROUPS + row * GROUPS + group
    tl.store(place, most + tl.log(total), mask=row < n_rows)
    tl.store(place + n_rows * GROUPS, expected / total, mask=row < n_rows)
    tl.store(place + 2 * n_rows * GROUPS, right, mask=row < n_rows)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to fp32: for small exp(x) the log of a sum would lose its digits."""
    power = tl.exp(-tl.abs(x))
    half = power / (2.0 + power)
    square = half * half
    # log(1 + power) = 2 artanh(half), and half is at most 1/3.
    series = 1 / 11 + square * (1 / 13 + square * (1 / 15))
    series = 1 / 5 + square * (1 / 7 + square * (1 / 9 + square * series))
    return tl.maximum(x, 0.0) + 2 * half * (1 + square * (1 / 3 + square * series))


@triton.jit
def _gradient_kernel(
    rows, columns, scale, bias, image_logs, caption_logs, upstream, out, sums, n_rows, n_columns, first,
    WIDTH: tl.constexpr, SPAN: tl.constexpr,
    SIGMOID: tl.constexpr, IMAGES: tl.constexpr, CAPTIONS: tl.constexpr, GROUPS: tl.constexpr, RIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows, without its factor `scale`: sum over columns of the logit's gradient times the column.

    With IMAGES, rows are images and columns captions; otherwise the other way around. An image has CAPTIONS, and
    `first` is the image of the first row. With SIGMOID, the logit has a bias. If rows are images, `sums` [p, 4, n_rows]
    receives for each row the loss, the part of it from matching pairs, and the gradients of bias and scale. Without
    SIGMOID, `image_logs` [images, GROUPS] and `caption_logs` [captions] are the logarithms of the denominators,
    `upstream` [2] holds the gradients of the captions' and of the images' sum, and RIGHT is the number of matching
    captions in one softmax of an image. Program (i, p) reads SPAN columns from p * SPAN on. It adds to `out`
    [p, n_rows, WIDTH], which the caller fills with zeros. Without GRADIENT it leaves `out` as it is.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    factor = tl.load(scale)
    value = tl.zeros((ROWS,), tl.float32)
    share = tl.zeros((ROWS,), tl.float32)
    by_bias = tl.zeros((ROWS,), tl.float32)
    by_scale = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, SPAN, COLUMNS):
        column = part * SPAN + tile + tl.arange(0, COLUMNS)
        there = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        products = _products(rows, columns, row, column, n_rows, n_columns, WIDTH, ROWS, COLUMNS, DEPTH)
        if IMAGES:
            own = (column // CAPTIONS)[None, :] == (first + row)[:, None]
        else:
            own = column[None, :] == (first + row // CAPTIONS)[:, None]
        if SIGMOID:
            logits = factor * products + tl.load(bias)
            slope = 1 / (1 + tl.exp(-logits)) - tl.where(own, 1.0, 0.0)
            if IMAGES:
                values = tl.where(there, _softplus(tl.where(own, -logits, logits)), 0.0)
                value += tl.sum(values, 1)
                share += tl.sum(tl.where(own, values, 0.0), 1)
                by_bias += tl.sum(tl.where(there, slope, 0.0), 1)
                by_scale += tl.sum(tl.where(there, slope * products, 0.0), 1)
        else:
            if IMAGES:
                by_image = row[:, None] * GROUPS + (column % GROUPS)[None, :]
                by_caption = tl.broadcast_to(column[None, :], (ROWS, COLUMNS))
            else:
                by_image = column[None, :] * GROUPS + (row % GROUPS)[:, None]
                by_caption = tl.broadcast_to(row[:, None], (ROWS, COLUMNS))
            logits = factor * products
            to_image = tl.exp(logits - tl.load(caption_logs + by_caption, mask=there, other=0.0))
            to_caption = tl.exp(logits - tl.load(image_logs + by_image, mask=there, other=0.0))
            of_captions, of_images = tl.load(upstream), tl.load(upstream + 1)
            slope = of_captions * to_image + of_images * RIGHT * to_caption
            slope -= tl.where(own, of_captions + of_images, 0.0)
        slope = tl.where(there, slope, 0.0)
        # No other program touches these rows of `out`. The sum lies in memory, as features may be too wide for
        # registers; the barrier lets each thread see what the others have added.
        for begin in range(0, WIDTH if GRADIENT else 0, DEPTH):
            depth = begin + tl.arange(0, DEPTH)
            right = (column < n_columns)[:, None] & (depth < WIDTH)[None, :]
            b = tl.load(columns + column.to(tl.int64)[:, None] * WIDTH + depth[None, :], mask=right, other=0.0)
            place = out + (part.to(tl.int64) * n_rows + row)[:, None] * WIDTH + depth[None, :]
            kept = (row < n_rows)[:, None] & (depth < WIDTH)[None, :]
            held = tl.load(place, mask=kept, other=0.0)
            tl.store(place, tl.dot(slope, b, held, input_precision="tf32x3"), mask=kept)
        tl.debug_barrier()
    if SIGMOID and IMAGES:
        place = sums + part * 4 * n_rows + row
        tl.store(place, value, mask=row < n_rows)
        tl.store(place + n_rows, share, mask=row < n_rows)
        tl.store(place + 2 * n_rows, by_bias, mask=row < n_rows)
        tl.store(place + 3 * n_rows, by_scale, mask=row < n_rows)


def _split(n_rows: int, n_columns: int, groups: int = 1) -> tuple[int, int, int]:
    """Tiles of rows, parts of the columns, and columns of a part."""
    tiles, columns = triton.cdiv(n_rows, _TILE["ROWS"]), triton.cdiv(n_columns, _TILE["COLUMNS"])
    span = triton.cdiv(columns, max(1, _PROGRAMS // (tiles * groups))) * _TILE["COLUMNS"]
    return tiles, triton.cdiv(n_columns, span), span


def _softmax(
    rows: Tensor, columns: Tensor, scale: Tensor, first: int, groups: int, per_row: int, per_column: int
) -> tuple[Tensor, Tensor]:
    """Logs of the denominators [rows, groups]; and of all softmaxes' losses, the sum and its gradient by the scale."""
    tiles, parts, span = _split(len(rows), len(columns) // groups, groups)
    out = rows.new_empty(parts, 3, len(rows), groups)
    _softmax_kernel[tiles, groups, parts](
        *(rows, columns, scale, out, len(rows), len(columns), first),
        WIDTH=rows.shape[1],
        SPAN=span,
        GROUPS=groups,
        PER_ROW=per_row,
        **{"PER_COLUMN": per_column, **_TILE, "num_warps": _WARPS},
    )
    logs, expected, right = out.unbind(1)
    whole = logs.logsumexp(0)
    expected = ((logs - whole).exp() * expected).sum(0)
    times, right = per_column // groups, right.sum(0)
    return whole, torch.stack(((times * whole - right).sum(), (times * expected - right).sum() / scale))


def _gradient(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    first: int,
    captions: int,
    *,
    images: bool,
    bias: Tensor | None = None,
    logs: tuple[Tensor, Tensor] | None = None,
    upstream: Tensor | None = None,
    groups: int = 1,
    wanted: bool = True,
) -> tuple[Tensor, Tensor]:
    """The rows' gradient [rows, D] if `wanted`, and the sums [4] that the sigmoid loss takes from images' rows."""
    tiles, parts, span = _split(len(rows), len(columns))
    out, sums = rows.new_zeros(parts if wanted else 0, *rows.shape), rows.new_zeros(parts, 4, len(rows))
    by_image, by_caption = logs or (rows, rows)
    _gradient_kernel[tiles, parts](
        *(rows, columns, scale, rows if bias is None else bias, by_image, by_caption),
        *(rows if upstream is None else upstream, out, sums, len(rows), len(columns), first),
        WIDTH=rows.shape[1],
        SPAN=span,
        SIGMOID=bias is not None,
        IMAGES=images,
        GRADIENT=wanted,
        **{"CAPTIONS": captions, "GROUPS": groups, "RIGHT": captions // groups, **_TILE, "num_warps": _WARPS},
    )
    return scale * out.sum(0), sums.sum((0, 2))


def softmax_sums(
    image: Tensor, text: Tensor, scale: Tensor, image_to_text: Literal["slot", "all"], gather: bool
) -> Tensor:
    """[2]: both directions of the contrastive loss, summed over this rank's images [b, D] and captions [b, M, D].

    The features have length one. Backward expects the same factors on every rank; other arguments as in
    `contrastive_loss`.
    """
    found: Tensor = _SoftmaxTiles.apply(image, text, scale, image_to_text == "all", gather)  # type: ignore[no-untyped-call]
    return found


class _SoftmaxTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, whole: bool, gather: bool) -> Tensor:
        rows, captions, _ = text.shape
        image, text = image.contiguous(), text.contiguous()
        every_image, every_text = (gather_with_grad(image), gather_with_grad(text)) if gather else (image, text)
        ctx.first, ctx.groups = (rank() * rows if gather else 0), (1 if whole else captions)
        by_caption, t2v = _softmax(text.flatten(0, 1), every_image, scale, ctx.first, 1, captions, 1)
        by_image, v2t = _softmax(image, every_text.flatten(0, 1), scale, ctx.first, ctx.groups, 1, captions)
        logs = torch.cat((by_caption.reshape(rows, captions), by_image), 1)
        every_log = gather_with_grad(logs) if gather else logs
        sums, ctx.by_scale = torch.stack((t2v, v2t), 1)
        ctx.save_for_backward(image, text, scale, every_image, every_text, logs, every_log)
        found: Tensor = sums
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        image, text, scale, every_image, every_text, logs, every_log = ctx.saved_tensors
        captions = text.shape[1]
        way = {"upstream": upstream.contiguous(), "groups": ctx.groups}

        def logs_of(images: Tensor, of_captions: Tensor) -> tuple[Tensor, Tensor]:
            return images[:, captions:].contiguous(), of_captions[:, :captions].contiguous()

        common = (scale, ctx.first, captions)
        by_image, _ = _gradient(
            image, every_text.flatten(0, 1), *common, images=True, logs=logs_of(logs, every_log), **way
        )
        by_text, _ = _gradient(
            text.flatten(0, 1), every_image, *common, images=False, logs=logs_of(every_log, logs), **way
        )
        return by_image, by_text.view_as(text), (upstream * ctx.by_scale).sum(), None, None


def sigmoid_pairs(
    image: Tensor, captions: Tensor, scale: Tensor, bias: Tensor, own: bool, gradients: bool = True
) -> tuple[Tensor, ...]:
    """The sigmoid loss of this rank's images [b, D] with the captions [b*M, D] of one rank, `own` ones or another's.

    Returns the sum over pairs, its share of the matching pairs, and with `gradients` those of image, scale, bias and
    captions.
    """
    image, captions = image.contiguous(), captions.contiguous()
    per_image = len(captions) // len(image)
    # Beyond the last image, `first` matches nothing.
    common: Any = (scale, 0 if own else len(image), per_image)
    by_image, sums = _gradient(image, captions, *common, images=True, bias=bias, wanted=gradients)
    if not gradients:
        return sums[0], sums[1]
    by_text, _ = _gradient(captions, image, *common, images=False, bias=bias)
    total, positive, by_bias, by_scale = sums
    return total, positive, by_image, by_scale, by_bias, by_text
