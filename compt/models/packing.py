"""Captions of any lengths one after the other, without padding, and attention within each of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from compt.models.pixels import sent

# torch 2.10 has `is_causal`; later versions have a window, here of all keys to the left and none to the right.
_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if _WINDOW else {"is_causal": True}


# Not frozen: torch.compile reads every field of a frozen dataclass, and compiles again for every other `groups`.
@dataclass(eq=False)
class Packing:
    """Where the T tokens of N captions lie when they are packed, the shortest caption first.

    Tensors int32 on the model's device. `taken` [T]: the place of each token in the flat, padded batch. `positions`
    [T]: its position in its caption. `starts` [N + 1]: where each caption begins, and T. `last` [N]: the place of each
    caption's end of text. `places` [N]: where each caption of the batch is among the packed ones. `lengths` [N]: in
    packed order. `groups`: the lengths that occur, ascending, and how many captions have each; none where the
    tensors are buffers that change. No caption is longer than `context`.
    """

    taken: Tensor
    positions: Tensor
    starts: Tensor
    last: Tensor
    places: Tensor
    lengths: Tensor
    groups: tuple[tuple[int, int], ...]
    context: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return (self.taken, self.positions, self.starts, self.last, self.places, self.lengths)


Lengths = Tensor | Packing
"""How long captions are: int64 on the CPU, or how they are packed already."""
SIZES = 32
"""Numbers of tokens of packed text where CUDA graphs are captured. A step is filled up by 1/64 of all contexts in the
mean and 1/32 at most, and most steps of a run have one or two of these sizes."""


def pack(lengths: Tensor, padded: int, context: int, device: torch.device, sizes: int | None = None) -> Packing:
    """Pack captions of `lengths` (int64 [N] on the CPU, N > 0) from a batch padded to `padded` tokens.

    All index tensors travel to `device` in one copy that does not wait. With `sizes`, captions that nobody reads
    follow, so that batches of N captions have at most `sizes` + 1 numbers of tokens, from which all shapes follow.
    """
    order = lengths.argsort(stable=True)
    ordered = lengths[order]
    taken = (order * padded).repeat_interleave(ordered)
    if sizes is not None:
        unread = _unread(int(ordered.sum()), len(ordered), context, sizes)
        taken = torch.cat([taken, taken.new_zeros(int(unread.sum()))])
        ordered = torch.cat([ordered, unread])
    ends = ordered.cumsum(0)
    starts = ends - ordered
    positions = torch.arange(int(ends[-1])) - starts.repeat_interleave(ordered)
    # An unread caption has the first tokens of the batch, as many as fit into the padded length.
    taken = (taken + positions).clamp_(max=len(lengths) * padded - 1)
    parts = (taken, positions, torch.cat([starts, ends[-1:]]), ends - 1, order.argsort(), ordered)
    moved = sent(torch.cat(parts).int(), device).split([len(part) for part in parts])
    alike, counts = ordered.unique_consecutive(return_counts=True)
    rest: Any = (tuple(zip(alike.tolist(), counts.tolist(), strict=True)), context)
    return Packing(*moved, *rest)


def _unread(tokens: int, captions: int, context: int, sizes: int) -> Tensor:
    """Lengths of the captions that fill `tokens` up to a size: of 1 to `context` tokens, and always equally many."""
    fill = filled(tokens, captions, context, sizes) - tokens
    count = _unread_captions(captions, context, sizes)
    return torch.tensor([fill // count + (at < fill % count) for at in range(count)])


def filled(tokens: int, captions: int, context: int, sizes: int) -> int:
    """The number of tokens that `pack` fills the `tokens` of `captions` up to, with `sizes`."""
    step = _step(captions, context, sizes)
    return -(-(tokens + _unread_captions(captions, context, sizes)) // step) * step


def _step(captions: int, context: int, sizes: int) -> int:
    """Tokens from one size to the next."""
    return -(-captions * context // sizes)


def _unread_captions(captions: int, context: int, sizes: int) -> int:
    step = _step(captions, context, sizes)
    return max(1, -(-(step - 1) // max(1, context - 1)))


def attention(read: Tensor | None, others: Tensor, packing: Packing) -> Tensor:
    """Softmax attention within each caption of a `packing`; H heads of width D.

    `others` [T, 3, H, D] are queries, keys and values of all tokens: causal, -> [T, H, D]. With `read` [N, H, D], the
    queries of each caption's last token only, `others` [T, 2, H, D] are keys and values: -> [N, H, D].

    A GPU takes torch's kernel for sequences of any lengths, or pads only for attention where that kernel does not run.
    Elsewhere the captions of one length, which lie side by side, are one call. (Measured on a CPU, four captions an
    image: half the time of padding to the longest of each of four groups.)
    """
    if not others.is_cuda and packing.groups:
        return cast(Tensor, _by_length(read, others, packing))
    kernel = others.is_cuda and _has_kernel(others)
    return _by_kernel(read, others, packing) if kernel else _by_padding(read, others, packing)


def _has_kernel(x: Tensor) -> bool:
    """Whether flash attention runs on numbers and heads like these. Without a GPU (fake tensors): as on a new one."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.shape[-1] % 8 or x.shape[-1] > 256:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _by_kernel(read: Tensor | None, others: Tensor, packing: Packing) -> Tensor:
    starts, most = packing.starts, packing.context
    *query, key, value = others.unbind(1)
    if read is None:
        return cast(Tensor, varlen_attn(query[0], key, value, starts, starts, most, most, **_CAUSAL))
    one_each = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
    return cast(Tensor, varlen_attn(read, key, value, one_each, starts, 1, most))


def _by_padding(read: Tensor | None, others: Tensor, packing: Packing) -> Tensor:
    count, context = len(packing.lengths), packing.context
    places = torch.arange(count, dtype=torch.int32, device=others.device) * context
    slots = places.repeat_interleave(packing.lengths, output_size=len(others)) + packing.positions
    padded = others.new_zeros(count * context, *others.shape[1:]).index_copy(0, slots.long(), others)
    *query, key, value = _by_head(padded, count, context)
    if read is None:
        mixed = F.scaled_dot_product_attention(query[0], key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, slots)
    mask = torch.arange(context, device=others.device) < packing.lengths[:, None]
    return F.scaled_dot_product_attention(read[:, :, None], key, value, attn_mask=mask[:, None, None]).squeeze(2)


def _by_head(x: Tensor, count: int, length: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of captions of one length, or the latter two: each [count, H, length, D], all views."""
    return x.view(count, length, *x.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)


# Not compiled: the lengths that occur change from step to step, and each set of them would be compiled once more.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_length(read: Tensor | None, others: Tensor, packing: Packing) -> Tensor:
    mixed = []
    counts = [count for _, count in packing.groups]
    last = [None] * len(counts) if read is None else read.split(counts)
    pieces = others.split([length * count for length, count in packing.groups])
    for one_each, piece, (length, count) in zip(last, pieces, packing.groups, strict=True):
        *query, key, value = _by_head(piece, count, length)
        if one_each is None:
            found = F.scaled_dot_product_attention(query[0], key, value, is_causal=True)
        else:
            found = F.scaled_dot_product_attention(one_each[:, :, None], key, value)
        mixed.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)
