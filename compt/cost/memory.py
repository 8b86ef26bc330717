"""Memory of a GPU, and disk space, for training one model, from shapes alone.

What is counted, what is assumed and what was checked is in docs/memory.md. Parameters are fp32 under every engine; the
engines' tables of bytes per parameter (P parameters, of which V in vectors; n GPUs):

| engine | weights | gradients | optimizer |
|--------|---------|-----------|-----------|
| ddp    | 4P | 4P | 8P |
| fsdp2  | 4(P - V)/n + 4V + gathered units | 4(P - V)/n + 4V | 8(P - V)/n + 8V |
| zero0  | 4P | 4P | 8P |
| zero1  | 4P | 4P/n, several micro-batches 4P more | 12P/n (weights again among them) |
| zero2  | 4P | 4P/n | 12P/n |
| zero3  | 4P/n + 4 for what is small + gathered units | 4P/n | 12P/n |

and autocast's copies of matrices in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from compt.cost.activations import (
    FP32,
    BlockShape,
    Shape,
    backward_bytes,
    distillation_bytes,
    image_tower,
    kept_by_towers,
    task_loss_kept,
    task_loss_working,
    text_tower,
    working_of_towers,
)
from compt.cost.counts import Tokens, parameters, projectors
from compt.models.presets import ModelSpec
from compt.models.scalars import LOSS_TRAITS
from compt.recipe.engine import ENGINES, EngineKind

PRECISION_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number that is computed with."""

ZERO_BUCKET = 50_000_000
"""Numbers in the buffer that DeepSpeed reduces gradients in: `reduce_bucket_size` of compt's ds_configs."""

ZERO_PERSISTENT = 100_000
"""Numbers of a parameter up to which stage 3 leaves it whole: `stage3_param_persistence_threshold` of ds_configs."""

CAPTION_BYTES = 128
"""What the entry of a cached caption takes in a dict beside its features and the numbers of its tokens, of
`CAPTION_TOKEN` bytes each: measured for CPython 3.11, a test holds it."""
CAPTION_TOKEN = 4

_MOMENTS = 2 * FP32
_TOKEN = _COUNT = 8
"""Bytes of a token's number, and of the number of steps in an average."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU during a training step, by what they are for.

    `weights`: the student's parameters and those of its projectors, copies in the compute type, gathered shards, the
    moving average. `gradients`, `optimizer` (moments, and fp32 weights where the engine keeps them there).
    `activations`: what the towers keep for backward. `teacher`: its weights and features. `loss`: features, and all
    that the two losses hold. `buffers`: the batch, masks, the engine's communication, gradients between layers.

    Each is what the part needs at most. `overlap` are bytes that are counted in two of them and never needed by both at
    the same time, as gradients come while activations go.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    teacher: float
    loss: float
    buffers: float
    overlap: float = 0.0

    @property
    def total_bytes(self) -> float:
        """What is needed at once: the sum of the parts without their overlap."""
        return math.fsum(asdict(self).values()) - 2 * self.overlap


@dataclass(frozen=True)
class _Sizes:
    """Parameters of what is trained: all, those in `copied` matrices, in `vectors`, in tensors so `small` that stage 3
    leaves them whole, the largest block, the token embeddings, those in neither.
    """

    all: int
    copied: int
    vectors: int
    small: int
    block: int
    root: int
    embedding: int
    tensors: int

    def cut(self, n: int) -> float:
        """Those that a rank of `n` has where matrices are cut up and vectors are not."""
        return (self.all - self.vectors) / n + self.vectors


def _blocks(spec: ModelSpec) -> list[BlockShape]:
    return [*image_tower(spec).blocks, *text_tower(spec).blocks]


def _sizes(spec: ModelSpec, teacher: ModelSpec | None) -> _Sizes:
    added = sum(one.parameters for one in projectors(spec, teacher).values()) if teacher else 0
    matrices = 2 * spec.embed_dim * teacher.embed_dim if teacher and added else 0
    towers = [image_tower(spec), text_tower(spec)]
    whole = parameters(spec) + added
    blocks = [block.parameters for block in _blocks(spec)]
    copied = sum(tower.copied() for tower in towers) + matrices
    embedding = spec.vocab_size * spec.text_width
    return _Sizes(
        all=whole,
        copied=copied,
        vectors=(vectors := whole - copied - embedding - sum(_uncopied(spec))),
        small=vectors + sum(size for size in _matrices(spec, teacher) if size <= ZERO_PERSISTENT),
        block=max(blocks),
        root=whole - sum(blocks) - embedding,
        embedding=embedding,
        tensors=sum(tower.tensors for tower in towers) + 1 + (4 if added else 0),
    )


def _uncopied(spec: ModelSpec) -> list[int]:
    """Sizes of the tensors that are not vectors and that autocast does not copy, except the token embeddings.

    Positional embeddings, a ViT's patches (a view is what is copied), a Swin's tables of position biases.
    """
    text = spec.context_length * spec.text_width
    if spec.arch == "vit":
        places = (spec.image_size // spec.patch_size) ** 2 + 1
        return [text, places * spec.width, 3 * spec.patch_size**2 * spec.width]
    return [text, *(block.table for block in _blocks(spec))]


def _matrices(spec: ModelSpec, teacher: ModelSpec | None) -> Iterator[int]:
    """Sizes of the tensors that are no vectors; a Swin's merging of patches is taken as no small one."""
    for block in _blocks(spec):
        yield from (3 * block.width**2, block.width**2, *[block.width * block.hidden] * 2)
    yield from (spec.vocab_size * spec.text_width, spec.final_width * spec.embed_dim, spec.text_width * spec.embed_dim)
    yield from _uncopied(spec)
    if spec.arch == "swin":
        yield 3 * spec.patch_size**2 * spec.width
    if teacher is not None and teacher.embed_dim != spec.embed_dim:
        yield from [spec.embed_dim * teacher.embed_dim] * 2


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds in a step. Gathered weights and autocast's copies do not count."""

    weights: float
    gradients: float
    optimizer: float
    communication: float
    teacher: float


def _share(kind: EngineKind, sizes: _Sizes, n: int) -> float:
    """Parameters of a rank of `n`, of what the engine shards."""
    return sizes.cut(n) if kind.unsharded == "vectors" else sizes.all / n


def _weights(kind: EngineKind, sizes: _Sizes, n: int) -> float:
    if "weights" not in kind.shards:
        return FP32 * sizes.all
    whole = sizes.small if kind.unsharded == "small" and n > 1 else 0
    return FP32 * (_share(kind, sizes, n) + whole)


def _gathered(kind: EngineKind, sizes: _Sizes, n: int, compute: int, reshard: bool) -> float:
    """Weights that are put together for a while, and copies in the compute type, at most."""
    copies = compute * sizes.copied if compute != FP32 else 0
    if "weights" not in kind.shards:
        return copies
    if kind.gathers == "compute":
        blocks = 2 * sizes.block if reshard else sizes.all - sizes.root - sizes.embedding
        return FP32 * sizes.root + compute * blocks
    return FP32 * min(max(sizes.block, sizes.embedding) + sizes.block, sizes.all * (1 - 1 / n)) + copies


def _gradients(kind: EngineKind, sizes: _Sizes, n: int, several: bool = False) -> float:
    """`several`: with several micro-batches."""
    if "gradients" not in kind.shards:
        return FP32 * sizes.all
    share = _share(kind, sizes, n)
    if "weights" not in kind.shards:
        share = max(share, sizes.embedding)
    return FP32 * (share + (sizes.all if kind.sums_whole_gradients and several else 0))


def _optimizer(kind: EngineKind, sizes: _Sizes, n: int) -> float:
    stepped = _share(kind, sizes, n) if "optimizer" in kind.shards else sizes.all
    # DeepSpeed steps copies of the weights, though these are fp32 too; the others count the steps of each tensor.
    return (_MOMENTS + FP32) * stepped if kind.steps_copies else _MOMENTS * stepped + FP32 * sizes.tensors


def _buckets(kind: EngineKind) -> float:
    """DeepSpeed's buffers, however small the model; two of them where the next is filled while one is sent off."""
    return FP32 * ZERO_BUCKET * kind.buckets


def held_bytes(
    spec: ModelSpec,
    teacher: ModelSpec | None,
    *,
    engine: str,
    world_size: int,
    shard_teacher: bool = False,
    precision: str = "bf16",
    replicas: int = 1,
) -> Held:
    """What each of `world_size` ranks holds between backward and step, when most is held."""
    kind = ENGINES[engine]
    sizes, n = _sizes(spec, teacher), _shards(kind, world_size, replicas)
    shared = world_size if shard_teacher else 1
    return Held(
        weights=_weights(kind, sizes, n),
        gradients=_gradients(kind, sizes, n),
        optimizer=_optimizer(kind, sizes, n),
        communication=_buckets(kind),
        teacher=_teacher_weights(teacher, PRECISION_BYTES[precision], shared) if teacher else 0.0,
    )


def _shards(kind: EngineKind, world_size: int, replicas: int) -> int:
    """How many ranks share one copy of the state."""
    return max(1, world_size // replicas) if kind.settings == "fsdp2" else world_size


def _communication(kind: EngineKind, sizes: _Sizes, compute: int) -> float:
    if kind.gathers == "compute":
        return (compute + compute + FP32) * sizes.block  # gathered in one piece, and its gradient sent off in fp32
    return _buckets(kind)  # DDP's buckets are the gradients themselves; stage 0 reduces after the backward pass


def _masks(spec: ModelSpec, number: int) -> int:
    """Bytes of a model's buffers: the causal mask and those of shifted windows."""
    return number * spec.context_length**2 + sum(block.mask_bytes(number) for block in _blocks(spec))


def memory_per_gpu(
    spec: ModelSpec,
    teacher: ModelSpec | None,
    *,
    engine: str,
    world_size: int,
    batch: int,
    captions: int,
    tokens: Tokens = None,
    precision: str = "bf16",
    micro_batch: int | None = None,
    recompute: bool = False,
    loss_chunk: int | None = None,
    shard_teacher: bool = False,
    ema: bool = False,
    replicas: int = 1,
    reshard: bool = True,
) -> Memory:
    """Bytes that each of `world_size` GPUs needs to train `spec` with `engine`, distilling from `teacher`, if any.

    `batch` is global, `micro_batch` of one GPU; `tokens` is the computed length of captions, a mean or shares by length
    (default: the context). `recompute`: blocks keep their input and are computed again in backward. `loss_chunk`:
    images of this GPU whose similarities are held at once. `shard_teacher`: the teacher lies in shards. `ema`: a
    moving average of the weights is kept. For fsdp2, `replicas`: groups of GPUs that each hold the whole state;
    `reshard`: blocks give their gathered weights up after the forward pass.
    """
    kind = ENGINES[engine]
    n = _shards(kind, world_size, replicas)
    rows = math.ceil(batch / world_size)
    piece = min(micro_batch or rows, rows)
    step = _Step(spec, teacher, kind, world_size, rows, piece, captions, tokens, precision, n)
    compute, sizes = step.compute, step.sizes
    weights = _weights(kind, sizes, n) + _gathered(kind, sizes, n, compute, reshard)
    if ema:
        # Of what the optimizer steps on a rank.
        weights += FP32 * (_share(kind, sizes, n) if "optimizer" in kind.shards else sizes.all) + _COUNT
    working = step.last_gradient + step.piece * working_of_towers(spec, compute, captions=captions, tokens=tokens)
    kept = kept_by_towers(spec, compute, captions=captions, tokens=tokens, recompute=recompute)
    parts = Memory(
        weights=weights,
        gradients=_gradients(kind, sizes, n, step.several),
        optimizer=_optimizer(kind, sizes, n),
        activations=step.piece * kept,
        teacher=_teacher(teacher, rows, captions, compute, world_size if shard_teacher else 1) if teacher else 0.0,
        loss=sum(step.loss(loss_chunk)),
        buffers=step.inputs + _masks(spec, FP32) + _communication(kind, sizes, compute) + working,
    )
    alive = step.most_alive(parts.gradients, recompute, loss_chunk)
    copies = compute * sizes.copied if step.copies else 0
    return replace(parts, overlap=parts.activations + parts.gradients + parts.loss + working + copies - alive)


@dataclass(frozen=True)
class _Step:
    """One step of one GPU: `rows` images, `piece` of them at a time."""

    spec: ModelSpec
    teacher: ModelSpec | None
    kind: EngineKind
    world_size: int
    rows: int
    piece: int
    captions: int
    tokens: Tokens
    precision: str
    shards: int

    @property
    def compute(self) -> int:
        return PRECISION_BYTES[self.precision]

    @property
    def sizes(self) -> _Sizes:
        return _sizes(self.spec, self.teacher)

    @property
    def copies(self) -> bool:
        """Whether autocast copies weights, and lets them go with the activations."""
        return self.kind.gathers != "compute" and self.compute != FP32

    @property
    def inputs(self) -> int:
        """The batch: images in fp32 and tokens."""
        return self.rows * (FP32 * 3 * self.spec.image_size**2 + _TOKEN * self.captions * self.spec.context_length)

    @property
    def several(self) -> bool:
        """Whether the features of several micro-batches are cached."""
        return self.piece < self.rows

    @property
    def reserved(self) -> bool:
        """Whether the memory of the gradients is there throughout: in the buffers of DDP and of DeepSpeed."""
        return self.kind.reserved == "always" or (self.kind.reserved == "among several" and self.world_size > 1)

    @property
    def last_gradient(self) -> float:
        """What the end of a backward pass holds beside all gradients: that of the embeddings before it is added to
        what is there, or sent off.
        """
        if self.kind.gathers == "compute":
            # Of the embeddings the gradient and, to be sent off, a copy; blocks are gathered no more then.
            copies = 2 if self.shards > 1 else 1
            blocks = self.compute * 2 * self.sizes.block + _communication(self.kind, self.sizes, self.compute)
            return max(0.0, FP32 * copies * self.sizes.embedding - blocks)
        return FP32 * self.sizes.embedding if self.reserved or self.several else 0

    @property
    def features(self) -> int:
        """Numbers in the student's features, and in the projected ones."""
        widths = {self.spec.embed_dim, *([self.teacher.embed_dim] if self.teacher else [])}
        return self.rows * (1 + self.captions) * sum(widths)

    def loss(self, chunk: int | None) -> tuple[float, float]:
        """What the losses keep, features included, and what their backward adds at most."""
        # Several micro-batches: features in fp32 and the gradient of each. One: features in the compute type.
        kind, times = (FP32, 2) if self.several else (self.compute, 1)
        kept = float(times * kind * self.features)
        if self.teacher:
            vectors = self.rows * (1 + self.captions)
            kept += distillation_bytes(vectors=vectors, width=self.teacher.embed_dim, compute=kind)
        pairwise = LOSS_TRAITS[self.spec.loss].pairwise
        shape = Shape(self.rows, self.world_size, self.captions, self.spec.embed_dim, chunk, pairwise)
        return kept + task_loss_kept(shape, kind), task_loss_working(shape)

    def most_alive(self, gradients: float, recompute: bool, chunk: int | None) -> float:
        """Bytes of activations, losses, gradients and what is between them, at their greatest together."""
        kept, working = self.loss(chunk)
        backward = backward_bytes(
            self.spec,
            self.compute,
            rows=self.piece,
            captions=self.captions,
            tokens=self.tokens,
            recompute=recompute,
            loss=0.0 if self.several else kept + working,
            gradient=0.0 if self.reserved or self.several else gradients / self.sizes.all,
            copied=self.compute if self.copies else 0,
        )
        if self.reserved or self.several:
            backward = gradients + max(backward, self.last_gradient)
        else:
            backward = max(backward, gradients + self.last_gradient)
        if not self.several:
            return backward
        # The losses are over before a micro-batch is run again; of them the gradients of all features remain.
        return max(backward + FP32 * self.features, kept + working + (gradients if self.reserved else 0))


def _teacher_weights(teacher: ModelSpec, compute: int, n: int) -> float:
    return compute * parameters(teacher) / n + _masks(teacher, compute)


def _teacher(teacher: ModelSpec, rows: int, captions: int, compute: int, n: int) -> float:
    """The frozen teacher in the compute type, in `n` shards, and its features."""
    gathered = 0.0
    if n > 1:
        sizes = _sizes(teacher, None)
        gathered = compute * (sizes.root + max(sizes.embedding, 2 * sizes.block))
    return _teacher_weights(teacher, compute, n) + gathered + compute * rows * (1 + captions) * teacher.embed_dim


def artefact_bytes(spec: ModelSpec, *, ema: bool = False) -> int:
    """Bytes of the tensors of a model folder in fp32, twice with a moving average. Headers and JSON are not counted."""
    return FP32 * parameters(spec) * (2 if ema else 1)


def checkpoint_bytes(
    spec: ModelSpec, teacher: ModelSpec | None, *, engine: str = "ddp", ema: bool = False, precision: str = "bf16"
) -> int:
    """Bytes of the tensors of one checkpoint to resume from: weights, both moments, steps, projectors, the average.

    All ranks of `engine` together. The teacher is not in it, but decides on the projectors. Headers and JSON are not
    counted.
    """
    sizes, kind = _sizes(spec, teacher), ENGINES[engine]
    scaler = 16 if precision == "fp16" else 0
    average = FP32 * sizes.all + _COUNT if ema else 0
    # DeepSpeed writes the optimizer's copies of the weights, and beside them weights that are whole on every rank.
    twice = FP32 * sizes.all if kind.steps_copies and "weights" not in kind.shards else 0
    return (FP32 + _MOMENTS) * sizes.all + twice + FP32 * sizes.tensors + scaler + average
