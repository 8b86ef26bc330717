"""CLIP from open_clip's modules: the same parameters under the same names, with a cheaper forward pass.

Two savings are exact and need no option. Text is cut after the longest caption: the mask is causal and the feature is
read at the end-of-text token, so later tokens do not matter. The last block of a transformer computes only the token
that is read (class token or end of text); it needs the other tokens only for keys and values.

Packed text, which computes no padding at all, is an option (`compt.models.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import open_clip.model
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compt.models.init import init_parameters, load_state
from compt.models.packing import Lengths, Packing, attention, filled, pack
from compt.models.pixels import sent
from compt.models.presets import PACKED, ModelSpec
from compt.models.scalars import exported_shape
from compt.models.swin import register_swin

T = TypeVar("T", bound=nn.Module)


class _Cast(torch.autograd.Function):
    """Several tensors in another type, by one kernel, as their gradients are on the way back."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *given, dtype = arguments
        ctx.dtype = given[0].dtype
        return _copies(given, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*_copies(gradients, ctx.dtype), None)


def _copies(given: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = [torch.empty_like(one, dtype=dtype) for one in given]
    torch._foreach_copy_(made, [*given])
    return tuple(made)


class _Products(NamedTuple):
    """Weight and bias of each matrix product of a block."""

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


class Block(nn.Module):
    """open_clip's residual attention block with the same submodules, calling attention directly."""

    def __init__(self, stock: ResidualAttentionBlock, causal: bool) -> None:
        super().__init__()
        self.ln_1 = stock.ln_1
        self.attn = stock.attn
        self.ln_2 = stock.ln_2
        self.mlp = stock.mlp
        self.causal = causal

    def get_weight_dtype(self) -> torch.dtype:
        """The dtype of the weights; open_clip reads the dtype of a tower from its first block."""
        return cast(nn.Linear, self.mlp.c_fc).weight.dtype

    def forward(
        self,
        x: Tensor,
        read: Tensor | None = None,
        attn_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """[N, L, D] -> [N, L, D]; with `read` (int64 [N], a position each) only those tokens: [N, D].

        With `packing`, `x` holds the T tokens of N captions: [T, D] -> [T, D]. `read` (int [N]) then has the place of
        each token to read among all T, which is the last one of its caption.

        `attn_mask` is ignored: open_clip's own callers pass the causal mask, and the block knows whether it applies.
        """
        weights = self._weights(x, together=packing is not None or not self.causal)
        normed = self.ln_1(x)
        if packing is not None:
            at = None if read is None else normed.index_select(0, read)
            mixed = self._mix_packed(normed, at, packing, weights)
            x = x if read is None else x.index_select(0, read)
        elif read is None:
            mixed = self._mix(normed, weights)
        else:
            rows = torch.arange(x.shape[0], device=x.device)
            mixed = self._mix_at(normed, normed[rows, read], read, weights)
            x = x[rows, read]
        x = x + F.linear(mixed, weights.out, weights.out_bias)
        hidden = self.mlp.gelu(F.linear(self.ln_2(x), weights.up, weights.up_bias))
        return x + F.linear(hidden, weights.down, weights.down_bias)

    def _weights(self, x: Tensor, together: bool) -> _Products:
        """The weights; with `together` in the type that autocast would cast each of them to, with a kernel for each.

        Text in buckets comes by several times. Autocast then keeps its copies, and this would make others every time.
        """
        attn, up, down = self.attn, cast(nn.Linear, self.mlp.c_fc), cast(nn.Linear, self.mlp.c_proj)
        out = attn.out_proj
        found = [
            attn.in_proj_weight,
            attn.in_proj_bias,
            out.weight,
            out.bias,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
        ]
        device = x.device.type
        if (
            together
            and device in ("cuda", "cpu")
            and torch.is_autocast_enabled(device)
            and not torch.compiler.is_compiling()
        ):
            wide = [at for at, one in enumerate(found) if one.dtype == torch.float32]
            narrow = _Cast.apply(*(found[at] for at in wide), torch.get_autocast_dtype(device))  # type: ignore[no-untyped-call]
            for at, one in zip(wide, narrow, strict=True):
                found[at] = one
        return _Products(*found)

    def _mix(self, x: Tensor, weights: _Products) -> Tensor:
        n, length, width = x.shape
        packed = F.linear(x, weights.qkv, weights.qkv_bias)
        q, k, v = packed.view(n, length, 3, self.attn.num_heads, self.attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(n, length, width)

    def _mix_at(self, x: Tensor, at: Tensor, read: Tensor, weights: _Products) -> Tensor:
        n, length, width = x.shape
        heads, size = self.attn.num_heads, self.attn.head_dim
        q = F.linear(at, weights.qkv[:width], weights.qkv_bias[:width]).view(n, heads, 1, size)
        packed = F.linear(x, weights.qkv[width:], weights.qkv_bias[width:])
        k, v = packed.view(n, length, 2, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if self.causal:
            mask = (torch.arange(length, device=x.device) <= read[:, None])[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.reshape(n, width)

    def _mix_packed(self, x: Tensor, at: Tensor | None, packing: Packing, weights: _Products) -> Tensor:
        """Attention within each caption of all tokens `x` [T, D], or only of the last tokens `at` [N, D]."""
        heads, size, width = self.attn.num_heads, self.attn.head_dim, x.shape[1]
        if at is None:
            read = None
            others = F.linear(x, weights.qkv, weights.qkv_bias).view(-1, 3, heads, size)
        else:
            read = F.linear(at, weights.qkv[:width], weights.qkv_bias[:width]).view(-1, heads, size)
            others = F.linear(x, weights.qkv[width:], weights.qkv_bias[width:]).view(-1, 2, heads, size)
        return attention(read, others, packing).flatten(1)


def caption_lengths(tokens: Tensor) -> Tensor:
    """Tokens int64 [..., L] -> int64 [...]: the length of each caption up to its end of text, its highest token."""
    return tokens.argmax(dim=-1) + 1


def _length_groups(lengths: Tensor, buckets: int) -> tuple[Tensor, ...]:
    return lengths.argsort(stable=True).chunk(buckets)


def padded_tokens(lengths: Tensor, buckets: int = 1) -> int:
    """The token positions that `encode_captions` computes for captions of these lengths (int64 [N], on the CPU)."""
    if buckets == PACKED:
        return int(lengths.sum())
    return sum(len(group) * int(lengths[group[-1]]) for group in _length_groups(lengths, buckets))


class ClipModel(open_clip.model.CLIP):
    """open_clip's CLIP: its state dict, its features (to rounding), fewer operations. Learned scalars: [1]."""

    text_sizes: int | None = None
    """To how many numbers of tokens packed text is filled up; None: it is not."""

    def __init__(self, spec: ModelSpec) -> None:
        if spec.arch == "swin":
            register_swin(spec.timm_name)
        super().__init__(**spec.open_clip_config(), nonscalar_logit_scale=True)
        self.spec = spec
        _use_blocks(self.transformer, causal=True)
        if isinstance(self.visual, VisionTransformer):
            _use_blocks(self.visual.transformer, causal=False)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Images float [N, 3, H, W], normalised by mean and std -> features [N, embed_dim], not of unit length."""
        features = self._image_tower(image)
        return F.normalize(features, dim=-1) if normalize else features

    def compile_towers(self, compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Let `compiled` replace each function that runs a whole tower. Names of parameters stay."""
        for name in ("_image_tower", "_text_tower", "_packed_tower"):
            setattr(self, name, compiled(getattr(self, name)))

    def _image_tower(self, image: Tensor) -> Tensor:
        visual = self.visual
        return self._encode_vit(visual, image) if isinstance(visual, VisionTransformer) else cast(Tensor, visual(image))

    def encode_text(self, text: Tensor, normalize: bool = False, length: int | None = None) -> Tensor:
        """Tokens int64 [N, L] with L <= context_length -> features [N, embed_dim], not of unit length.

        `length`: the longest caption. Without it the CPU waits for the GPU to find it.
        """
        if length is None:
            length = int(caption_lengths(text).max()) if len(text) else 1
        x = self._text_tower(text[:, :length])
        return F.normalize(x, dim=-1) if normalize else x

    def _text_tower(self, text: Tensor) -> Tensor:
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[: text.shape[1]].to(dtype)
        x = _run_blocks(self.transformer, x, text.argmax(dim=-1))
        return cast(Tensor, self.ln_final(x) @ self.text_projection)

    def computed_tokens(self, lengths: Tensor, buckets: int = 1) -> int:
        """`padded_tokens`, with those that fill packed text up."""
        tokens = padded_tokens(lengths, buckets)
        if buckets != PACKED or self.text_sizes is None:
            return tokens
        return filled(tokens, len(lengths), self.spec.context_length, self.text_sizes)

    def encode_captions(self, tokens: Tensor, buckets: int = 1, lengths: Lengths | None = None) -> Tensor:
        """As `encode_text`, in up to `buckets` groups of similar length, each cut to its own longest caption.

        With `buckets` PACKED all captions are computed together, without padding.

        tokens int64 [N, L] -> [N, embed_dim] in the order of `tokens`. `lengths`: the captions' lengths, int64 [N] on
        the CPU, or their packing; without them the CPU waits for the GPU to find them.
        """
        if isinstance(lengths, Packing):
            return self._packed_tower(tokens, lengths)
        if lengths is None:
            lengths = caption_lengths(tokens)
        lengths = lengths.cpu()
        if buckets == 1 or len(tokens) < 2:
            return self.encode_text(tokens, length=int(lengths.max()) if len(tokens) else 1)
        if buckets == PACKED:
            return self.encode_packed(tokens, lengths)
        groups = _length_groups(lengths, buckets)
        order = torch.cat(groups)
        order, inverse = sent(torch.stack([order, order.argsort()]), tokens.device)
        parts = [
            self.encode_text(part, length=int(lengths[group[-1]]))
            for part, group in zip(tokens[order].chunk(buckets), groups, strict=True)
        ]
        return torch.cat(parts)[inverse]

    def encode_packed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `encode_text`, without padding: the tokens of all captions are one sequence, except in attention.

        tokens int64 [N, L] -> [N, embed_dim]; `lengths`: the captions' lengths, int64 [N] on the CPU, N > 0.
        """
        packing = pack(lengths, tokens.shape[1], self.spec.context_length, tokens.device, self.text_sizes)
        return self._packed_tower(tokens, packing)

    def _packed_tower(self, tokens: Tensor, packing: Packing) -> Tensor:
        dtype = self.transformer.get_cast_dtype()
        ids = tokens.reshape(-1).index_select(0, packing.taken)
        x = self.token_embedding(ids).to(dtype)
        x = x + F.embedding(packing.positions, self.positional_embedding).to(dtype)
        x = _run_blocks(self.transformer, x, packing.last, packing)
        return cast(Tensor, (self.ln_final(x) @ self.text_projection).index_select(0, packing.places))

    @staticmethod
    def _encode_vit(visual: VisionTransformer, image: Tensor) -> Tensor:
        # A convolution with its kernel's size as stride is one matrix product over the flattened patches.
        n, channels = image.shape[:2]
        (rows, columns), (height, width) = visual.grid_size, visual.patch_size
        if tuple(image.shape[2:]) != (rows * height, columns * width):
            raise ValueError(f"images of {tuple(image.shape[2:])} for a model of {tuple(visual.image_size)} pixels")
        patches = image.view(n, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(patches.reshape(n, rows * columns, -1), visual.conv1.weight.flatten(1))
        first = visual.class_embedding.to(x.dtype).expand(n, 1, -1)
        x = visual.ln_pre(torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype))
        x = _run_blocks(visual.transformer, x, torch.zeros(n, dtype=torch.long, device=x.device))
        return cast(Tensor, visual.ln_post(x) @ visual.proj)


def _use_blocks(transformer: Transformer, causal: bool) -> None:
    transformer.resblocks = nn.ModuleList(Block(block, causal) for block in transformer.resblocks)


def _run_blocks(transformer: Transformer, x: Tensor, read: Tensor, packing: Packing | None = None) -> Tensor:
    last = len(transformer.resblocks) - 1
    for index, block in enumerate(transformer.resblocks):
        arguments = (x, read if index == last else None, None, packing)
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, *arguments, use_reentrant=False)
        else:
            x = block(*arguments)
    return x


def build(spec: ModelSpec, device: torch.device | str = "cpu", seed: int | None = None) -> ClipModel:
    """The model of `spec` in fp32.

    With a `seed` the parameters are those of `init_parameters`; without one open_clip draws them from torch's global
    generator; on the "meta" device they have no values (see `materialise`).
    """
    device = torch.device(device)
    with torch.device("meta" if seed is not None else device):
        model = ClipModel(spec)
    if seed is not None and device.type != "meta":
        materialise(model, device)
        init_parameters(model, spec, seed)
    return model


def exported_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape in files of every parameter of a model. Allocates no weights."""
    state = build(spec, device="meta").state_dict()
    return {name: exported_shape(name, tensor.shape) for name, tensor in state.items()}


def models_in(module: nn.Module) -> Iterator[ClipModel]:
    """The CLIP models in a module, itself included."""
    return (model for model in module.modules() if isinstance(model, ClipModel))


def materialise(module: nn.Module, device: torch.device | str) -> None:
    """Give a module from the "meta" device memory on `device`: buffers have their values, parameters have none yet."""
    module.to_empty(device=device)
    set_buffers(module)


def fill(module: T, initial: Mapping[str, Tensor], device: torch.device | str) -> T:
    """`materialise` a module and give it the values `initial`, read one tensor at a time.

    Raises ArtefactError when they are not those of the module.
    """
    materialise(module, device)
    load_state(module, initial)
    return module


@torch.no_grad()
def set_buffers(module: nn.Module) -> None:
    """Set the buffers of CLIP models that no state dict has: masks and positions."""
    for model in models_in(module):
        model.attn_mask.fill_(float("-inf")).triu_(1)
        for part in model.modules():
            if hasattr(part, "init_non_persistent_buffers"):
                part.init_non_persistent_buffers()


def shardable_blocks(model: ClipModel) -> list[nn.Module]:
    """The blocks that a sharding engine wraps one by one: those of the image tower, then those of the text tower."""
    if isinstance(model.visual, VisionTransformer):
        image: list[nn.Module] = list(model.visual.transformer.resblocks)
    else:
        image = [block for stage in model.visual.trunk.layers for block in stage.blocks]
    return image + list(model.transformer.resblocks)
