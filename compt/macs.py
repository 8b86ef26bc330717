"""Parameters and multiply-accumulates (MACs) of the models, from their shapes alone. No torch in here.

One MAC is one multiplication with its addition, two floating-point operations. Norms, activations, softmax and biases
are not counted, as in torch's own counter. Two ways of adding up the cost of training:

- `exact`: what this program does: real caption lengths, the configured number of captions, projector, contrastive loss,
  teacher, recomputation of cached features, and the optimizer once a step.
- `paper`: the accounting that reproduces the published tables (CoM-PT, Table G and Table 2), see `paper_training_macs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compt.config_types import checked_caption_tokens
from compt.errors import ConfigError
from compt.presets import ModelSpec

Mode = Literal["exact", "paper"]

Tokens = float | Mapping[int, float] | None
"""Tokens that are computed for a caption, padding included: a mean, or the share of captions of each length (any
non-negative weights, normalised here); None for the whole context. Attention grows with the square of a length, so
that a mean's cost is slightly below the mean cost; a distribution is counted exactly."""

PAPER_TEXT_PASSES = 6
"""Captions a sample in Table G's forward MACs (the paper's text says 4; one raw and five generated fit the table)."""
PAPER_TOKENS = 77
"""Tokens of a caption in the published accounting, padding included."""
PAPER_PARAMETER_MACS = 9
"""MACs that the published tables charge per parameter and *sample* for AdamW (its text says 3)."""
OPTIMIZER_PARAMETER_MACS = 3
"""MACs of AdamW per parameter and step: two moments and the update."""


@dataclass(frozen=True)
class Count:
    """Parameters, and MACs of one forward pass of one sample."""

    parameters: int = 0
    macs: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.parameters + other.parameters, self.macs + other.macs)

    def __mul__(self, times: int) -> Count:
        return Count(self.parameters * times, self.macs * times)


def total(counts: Iterable[Count]) -> Count:
    """The sum of several counts."""
    return sum(counts, Count())


def linear(inputs: int, outputs: int, positions: float, *, bias: bool = True) -> Count:
    """A dense layer applied at `positions` places."""
    return Count(inputs * outputs + bias * outputs, positions * inputs * outputs)


def attention_matmuls(width: int, pairs: float) -> Count:
    """The two products of attention over `pairs` of query and key: their scores, and the values weighted by them."""
    return Count(0, 2 * pairs * width)


def token_moments(tokens: Tokens, context: int) -> tuple[float, float]:
    """The mean of a caption's computed tokens and the mean of their square, each length cut to `context`.

    A mean stands for captions of that one length. Raises ConfigError for lengths or shares that cannot be.
    """
    if tokens is None:
        return context, context**2
    try:
        checked = checked_caption_tokens(tokens)
    except ValueError as error:
        raise ConfigError(f"caption tokens: {error}") from None
    if not isinstance(checked, Mapping):
        mean = min(checked, context)
        return mean, mean**2
    whole = math.fsum(checked.values())
    first, second = (
        math.fsum(share * min(length, context) ** power for length, share in checked.items()) / whole
        for power in (1, 2)
    )
    return first, second


def _norm(width: int) -> Count:
    return Count(2 * width)


def _sum_by_name(parts: Iterable[tuple[str, Count]]) -> dict[str, Count]:
    table: dict[str, Count] = {}
    for name, count in parts:
        table[name] = table.get(name, Count()) + count
    return table


def _blocks(
    width: int, depth: int, mlp_ratio: float, positions: float, squared: float, readout: bool
) -> list[tuple[str, Count]]:
    """Pre-norm transformer blocks with full attention, the same in both towers.

    `positions` is the (mean) length of a sequence and `squared` the (mean) square of it. With `readout` the last block
    has all positions as keys and values, but only one as query: the one that is read.
    """
    hidden = int(width * mlp_ratio)
    parts = [("norms", _norm(width) * 2 * depth)]
    last = (1, positions) if readout else (positions, squared)
    for layers, (queries, pairs) in ((depth - 1, (positions, squared)), (1, last)):
        keys_values = linear(width, 2 * width, positions)
        query_and_output = linear(width, width, queries) * 2
        mlp = linear(width, hidden, queries) + linear(hidden, width, queries)
        parts += [
            ("attention_projections", (keys_values + query_and_output) * layers),
            ("attention_matmuls", attention_matmuls(width, pairs) * layers),
            ("mlp", mlp * layers),
        ]
    return parts


def _vit(spec: ModelSpec, readout: bool) -> list[tuple[str, Count]]:
    patches = (spec.image_size // spec.patch_size) ** 2
    positions = patches + 1  # the class token
    return [
        ("patch_embedding", linear(3 * spec.patch_size**2, spec.width, patches, bias=False)),
        ("embeddings", Count((1 + positions) * spec.width)),
        *_blocks(spec.width, spec.depth, spec.mlp_ratio, positions, positions**2, readout),
        ("norms", _norm(spec.width) * (1 if spec.no_ln_pre else 2)),
        ("projection", linear(spec.final_width, spec.embed_dim, 1, bias=False)),
    ]


def _swin(spec: ModelSpec) -> list[tuple[str, Count]]:
    side = spec.image_size // spec.patch_size
    width = spec.width
    parts = [
        ("patch_embedding", linear(3 * spec.patch_size**2, width, side**2)),
        ("norms", _norm(width)),
    ]
    for stage, (depth, heads) in enumerate(zip(spec.depths, spec.stage_heads, strict=True)):
        if stage:
            side = math.ceil(side / 2)
            parts += [("merging", _norm(4 * width) + linear(4 * width, 2 * width, side**2, bias=False))]
            width *= 2
        window = min(spec.window, side)
        windows = math.ceil(side / window) ** 2  # a side that is no multiple of the window is padded for attention
        tokens = windows * window**2
        hidden = int(width * spec.mlp_ratio)
        parts += [
            ("attention_projections", (linear(width, 3 * width, tokens) + linear(width, width, tokens)) * depth),
            ("attention_matmuls", attention_matmuls(width, tokens * window**2) * depth),
            ("position_biases", Count((2 * window - 1) ** 2 * heads) * depth),
            ("mlp", (linear(width, hidden, side**2) + linear(hidden, width, side**2)) * depth),
            ("norms", _norm(width) * 2 * depth),
        ]
    return [*parts, ("norms", _norm(width)), ("projection", linear(width, spec.embed_dim, 1, bias=False))]


def image_tower(spec: ModelSpec, *, readout: bool = True) -> dict[str, Count]:
    """Parameters and MACs a picture of the image tower, by kind of module.

    `readout`: the last block of a ViT computes only the class token, as `compt.models` does; without, every position,
    as stock open_clip.
    """
    return _sum_by_name(_swin(spec) if spec.arch == "swin" else _vit(spec, readout))


def text_tower(spec: ModelSpec, tokens: Tokens = None, *, readout: bool = True) -> dict[str, Count]:
    """Parameters and MACs a caption of the text tower, by kind of module; `readout` as in `image_tower`.

    `tokens` are those that are computed, after trimming; no length counts beyond the context. Raises ConfigError for
    lengths that cannot be.
    """
    return _text(spec, *token_moments(tokens, spec.context_length), readout)


def _text(spec: ModelSpec, positions: float, squared: float, readout: bool) -> dict[str, Count]:
    return _sum_by_name(
        [
            ("embeddings", Count((spec.vocab_size + spec.context_length) * spec.text_width)),
            *_blocks(spec.text_width, spec.text_depth, spec.mlp_ratio, positions, squared, readout),
            ("norms", _norm(spec.text_width)),
            ("projection", linear(spec.text_width, spec.embed_dim, 1, bias=False)),
        ]
    )


def parameters(spec: ModelSpec) -> int:
    """All parameters of a model, the logit scale among them."""
    return total(image_tower(spec).values()).parameters + total(text_tower(spec).values()).parameters + 1


def forward_macs(spec: ModelSpec, captions: int, tokens: Tokens = None, *, readout: bool = True) -> float:
    """MACs of one forward pass of one picture with `captions` captions of `tokens` tokens (default: the context)."""
    image = total(image_tower(spec, readout=readout).values()).macs
    return image + captions * total(text_tower(spec, tokens, readout=readout).values()).macs


def block_recompute_macs(spec: ModelSpec, captions: int, tokens: Tokens = None) -> float:
    """MACs a sample of running all blocks of both towers forward once more, as activation checkpointing does.

    torch stops a block's recomputation when the last tensor that its backward needs is there again, which spares the
    second product of each MLP.
    """
    towers = (image_tower(spec), 1), (text_tower(spec, tokens), captions)
    return sum(
        times * (tower["attention_projections"].macs + tower["attention_matmuls"].macs + tower["mlp"].macs / 2)
        for tower, times in towers
    )


def projector(student: ModelSpec, teacher: ModelSpec, captions: int) -> Count:
    """The image and the text projector of feature distillation; nothing where the joint embeddings are equally wide."""
    if student.embed_dim == teacher.embed_dim:
        return Count()
    one = linear(student.embed_dim, teacher.embed_dim, 1)
    return Count(2 * one.parameters, (1 + captions) * one.macs)


def contrastive_macs(batch: int, captions: int, embed_dim: int) -> int:
    """Forward MACs a step of the two similarity products: captions against images, and images against captions."""
    return 2 * batch * batch * captions * embed_dim


def paper_parameters(spec: ModelSpec) -> int:
    """Parameters as Table G counts them: the image tower with its projection, and the text blocks alone.

    Left out are the text tower's embeddings, final norm and projection, and the logit scale.
    """
    text = text_tower(spec)
    block_norms = 2 * spec.text_depth * _norm(spec.text_width).parameters
    blocks = text["attention_projections"].parameters + text["mlp"].parameters + block_norms
    return total(image_tower(spec).values()).parameters + blocks


def paper_forward_macs(spec: ModelSpec) -> float:
    """Forward MACs a sample as in Table G: six captions of 77 tokens, Swin without its attention's two products."""
    image = image_tower(spec, readout=False)
    windows = image["attention_matmuls"].macs if spec.arch == "swin" else 0.0
    text = total(_text(spec, PAPER_TOKENS, PAPER_TOKENS**2, readout=False).values()).macs
    return total(image.values()).macs - windows + PAPER_TEXT_PASSES * text


def paper_training_macs(forward: float, patch_embedding: float, parameters: float) -> float:
    """Training MACs a sample as in Table G: 3 Cf - C1 + 9 P.

    Cf is the forward pass, whose backward costs twice as much; C1 the patch embedding, whose input needs no gradient;
    P the parameters of `paper_parameters`. 9 P stands for AdamW and is charged per sample, though an optimizer steps
    once a batch: the published figures need it so.
    """
    return 3 * forward - patch_embedding + PAPER_PARAMETER_MACS * parameters


@dataclass(frozen=True)
class JobCost:
    """What it costs to train one model: MACs per sample (a picture with its captions), per step, and in total."""

    mode: Mode
    student_forward_macs: float
    student_training_macs: float
    """Forward and backward of the student and its projectors; in `paper` mode with the optimizer's share."""
    teacher_forward_macs: float = 0.0
    recompute_macs: float = 0.0
    loss_macs: float = 0.0
    optimizer_step_macs: float = 0.0
    samples: float = 0.0
    steps: int = 0

    @property
    def sample_macs(self) -> float:
        """All that is paid for each sample, the teacher included, the optimizer not."""
        return self.student_training_macs + self.teacher_forward_macs + self.recompute_macs + self.loss_macs

    @property
    def total_macs(self) -> float:
        """The whole training: samples times `sample_macs`, and the optimizer's steps."""
        return self.samples * self.sample_macs + self.steps * self.optimizer_step_macs

    def to_json(self) -> dict[str, Any]:
        """Every field and `total_macs`, as plain values."""
        return {**asdict(self), "total_macs": self.total_macs}


def exact_cost(
    spec: ModelSpec,
    teacher: ModelSpec | None,
    *,
    steps: int,
    batch: int,
    captions: int,
    tokens: Tokens = None,
    recompute: bool = False,
    checkpointing: bool = False,
    chunked_loss: bool = False,
) -> JobCost:
    """The cost of `steps` steps of this program. `teacher` is the model whose features are distilled, if any.

    `tokens` are the computed ones of a caption (default: the context; each length capped at each model's own). What is
    computed again is in `recompute_macs`: with `recompute`, where the batch of a process is split into micro-batches,
    the student's whole forward pass; with `checkpointing` that of its blocks, in backward; with `chunked_loss`, where
    the rows of a process are more than the chunk, the similarities. Raises ConfigError for lengths that cannot be.
    """
    projectors = projector(spec, teacher, captions) if teacher else Count()
    forward = forward_macs(spec, captions, tokens) + projectors.macs
    similarities = contrastive_macs(batch, captions, spec.embed_dim) / batch
    again = (
        (recompute, forward),
        (checkpointing, block_recompute_macs(spec, captions, tokens)),
        (chunked_loss, similarities),
    )
    return JobCost(
        mode="exact",
        student_forward_macs=forward,
        student_training_macs=3 * forward - image_tower(spec)["patch_embedding"].macs,
        teacher_forward_macs=forward_macs(teacher, captions, tokens) if teacher else 0.0,
        recompute_macs=math.fsum(macs for wanted, macs in again if wanted),
        loss_macs=3 * similarities,
        optimizer_step_macs=OPTIMIZER_PARAMETER_MACS * (parameters(spec) + projectors.parameters),
        samples=steps * batch,
        steps=steps,
    )


def paper_cost(spec: ModelSpec, teacher: ModelSpec | None, *, samples: float, steps: int) -> JobCost:
    """The cost of `samples` samples in the published accounting; projectors, loss and trimming are not in it."""
    forward = paper_forward_macs(spec)
    return JobCost(
        mode="paper",
        student_forward_macs=forward,
        student_training_macs=paper_training_macs(
            forward, image_tower(spec)["patch_embedding"].macs, paper_parameters(spec)
        ),
        teacher_forward_macs=paper_forward_macs(teacher) if teacher else 0.0,
        samples=samples,
        steps=steps,
    )
