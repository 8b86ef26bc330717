"""The cost of training, part by part: forward, backward, recomputation, and the optimizer's update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compt.cost.counts import Count, Tokens, image_tower, projectors, scalars, similarity_macs, text_tower
from compt.models.presets import ModelSpec
from compt.models.scalars import LOSS_TRAITS

Mode = Literal["exact", "paper"]
Part = Literal["student", "projector", "loss", "teacher"]
Tower = Literal["image", "text", "both"]

OPTIMIZER_PARAMETER_MACS = 3
"""MACs of AdamW per parameter and step: two moments and the update."""

FIRST_LAYER = "patch_embedding"
"""The only products whose input needs no gradient: backward costs as much as forward, not twice as much."""
CHECKPOINTED_SHARE = {"attention_projections": 1.0, "attention_matmuls": 1.0, "mlp": 0.5}
"""Share of the forward pass that a checkpointed block computes again in backward, by kind of module. torch stops
recomputing at the last tensor that backward needs, the input of the MLP's second product, which is skipped."""


@dataclass(frozen=True)
class Record:
    """The cost of one kind of module, in one tower of one part.

    MACs are per sample (an image with all its captions), but `step_update_macs` is per step, for any batch size. A
    teacher's parameters are counted, but not trained. `tower` is "both" for what belongs to neither tower.
    """

    part: Part
    tower: Tower
    module: str
    parameters: int = 0
    forward_macs: float = 0.0
    backward_macs: float = 0.0
    recompute_macs: float = 0.0
    update_macs: float = 0.0
    step_update_macs: float = 0.0

    @property
    def sample_macs(self) -> float:
        """MACs per sample."""
        return self.forward_macs + self.backward_macs + self.recompute_macs + self.update_macs

    def step_macs(self, batch: int) -> float:
        """MACs per step of `batch` samples."""
        return batch * self.sample_macs + self.step_update_macs


@dataclass(frozen=True)
class JobCost:
    """The cost of training one model: MACs per sample (an image with its captions), per step, and in total."""

    mode: Mode
    student_forward_macs: float
    student_training_macs: float
    """Forward and backward of the student and its projectors; in `paper` mode including the optimizer."""
    teacher_forward_macs: float = 0.0
    recompute_macs: float = 0.0
    """MACs that the student and the loss compute again to save memory."""
    loss_macs: float = 0.0
    optimizer_step_macs: float = 0.0
    samples: float = 0.0
    steps: int = 0

    @property
    def sample_macs(self) -> float:
        """MACs per sample, including the teacher, without the optimizer."""
        return self.student_training_macs + self.teacher_forward_macs + self.recompute_macs + self.loss_macs

    @property
    def total_macs(self) -> float:
        """MACs of the whole training run: all samples, and the optimizer's steps."""
        return self.samples * self.sample_macs + self.steps * self.optimizer_step_macs

    def to_json(self) -> dict[str, Any]:
        """Every field and `total_macs`, as plain values."""
        return {**asdict(self), "total_macs": self.total_macs}


@dataclass(frozen=True)
class Breakdown:
    """The cost of training one model in steps of `batch` samples, by part, tower and kind of module."""

    mode: Mode
    batch: int
    records: tuple[Record, ...]

    def sum(self, *fields: str, parts: tuple[Part, ...] = ("student", "projector", "loss", "teacher")) -> float:
        """The sum of the named fields over the records of `parts`, by `math.fsum`."""
        values = (getattr(record, field) for record in self.records if record.part in parts for field in fields)
        return math.fsum(values)

    def cost(self, samples: float, steps: int) -> JobCost:
        """The sums, for a training run of `samples` samples in `steps` steps."""
        trained: tuple[Part, ...] = ("student", "projector")
        return JobCost(
            mode=self.mode,
            student_forward_macs=self.sum("forward_macs", parts=trained),
            student_training_macs=self.sum("forward_macs", "backward_macs", "update_macs", parts=trained),
            teacher_forward_macs=self.sum("forward_macs", parts=("teacher",)),
            recompute_macs=self.sum("recompute_macs"),
            loss_macs=self.sum("forward_macs", "backward_macs", parts=("loss",)),
            optimizer_step_macs=self.sum("step_update_macs"),
            samples=samples,
            steps=steps,
        )

    def of_steps(self, steps: int) -> JobCost:
        """The sums, for `steps` steps."""
        return self.cost(steps * self.batch, steps)


def backward_macs(module: str, forward: float) -> float:
    """MACs of backward: the gradients of both factors, each as large as the forward pass; one for the first layer.

    This holds for any matrix product, whichever of its factors are weights.
    """
    return forward if module == FIRST_LAYER else 2 * forward


def exact_breakdown(
    spec: ModelSpec,
    teacher: ModelSpec | None,
    *,
    batch: int,
    captions: int,
    tokens: Tokens = None,
    recompute: bool = False,
    checkpointing: bool = False,
    chunked_loss: bool = False,
    teacher_captions: float | None = None,
    teacher_tokens: Tokens = None,
) -> Breakdown:
    """The cost of training `spec` with compt, distilling features of `teacher` if there is one.

    `batch` is the global batch size; `tokens` are the computed tokens of a caption (default: the context; lengths are
    cut to the context of each model). Three ways to save memory compute something again. `recompute`: micro-batches
    run the student and its projectors forward twice. `checkpointing`: blocks run forward again in backward.
    `chunked_loss`: the similarities are computed again. `teacher_captions`: captions of a sample that the teacher
    computes, of `teacher_tokens`, where a cache has the others (default: all, of `tokens`).
    """

    def trained(part: Part, tower: Tower, counts: Mapping[str, Count], times: int) -> Iterator[Record]:
        for module, count in counts.items():
            forward = times * count.macs
            blocks = CHECKPOINTED_SHARE.get(module, 0.0) * forward if checkpointing else 0.0
            yield Record(
                part,
                tower,
                module,
                count.parameters,
                forward_macs=forward,
                backward_macs=backward_macs(module, forward),
                recompute_macs=(forward if recompute else 0.0) + blocks,
                step_update_macs=OPTIMIZER_PARAMETER_MACS * count.parameters,
            )

    records = [
        *trained("student", "image", image_tower(spec), 1),
        *trained("student", "text", text_tower(spec, tokens), captions),
        *trained("student", "both", scalars(spec), 1),
    ]
    if teacher is not None:
        for tower, one in projectors(spec, teacher).items():
            records += trained("projector", tower, {"projection": one}, 1 if tower == "image" else captions)
    pairwise = LOSS_TRAITS[spec.loss].pairwise
    similarities = similarity_macs(batch, captions, spec.embed_dim, pairwise=pairwise) / batch
    # The pairwise loss makes its gradients in the forward pass, so its chunks compute nothing again.
    again = similarities if chunked_loss and not pairwise else 0.0
    records.append(Record("loss", "both", "similarities", 0, similarities, 2 * similarities, again))
    if teacher is not None:
        records += frozen("image", image_tower(teacher), 1)
        many = captions if teacher_captions is None else teacher_captions
        records += frozen("text", text_tower(teacher, teacher_tokens or tokens), many)
        records += frozen("both", scalars(teacher), 1)
    return Breakdown("exact", batch, tuple(records))


def frozen(tower: Tower, counts: Mapping[str, Count], times: float) -> Iterator[Record]:
    """The records of a teacher's tower: only forward passes."""
    for module, count in counts.items():
        yield Record("teacher", tower, module, count.parameters, forward_macs=times * count.macs)
