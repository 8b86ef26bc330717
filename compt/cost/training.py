"""What training costs, part by part: forward, backward, what is computed again, and the optimizer's update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compt.cost.counts import Count, Tokens, contrastive_macs, image_tower, projectors, text_tower
from compt.models.presets import ModelSpec

Mode = Literal["exact", "paper"]
Part = Literal["student", "projector", "loss", "teacher"]
Tower = Literal["image", "text", "both"]

OPTIMIZER_PARAMETER_MACS = 3
"""MACs of AdamW per parameter and step: two moments and the update."""

FIRST_LAYER = "patch_embedding"
"""The only products whose input needs no gradient, so that their backward costs once, not twice, their forward."""
CHECKPOINTED_SHARE = {"attention_projections": 1.0, "attention_matmuls": 1.0, "mlp": 0.5}
"""Share of each kind's forward that a checkpointed block computes again in backward. torch ends a recomputation with
the last tensor that backward asks for, the input of the MLP's second product: that product is spared."""


@dataclass(frozen=True)
class Record:
    """One kind of module in one tower of one part of a training.

    MACs are those of a sample, a picture with all its captions; `step_update_macs` those of a step, whatever the batch.
    A teacher's parameters are counted, but not trained. `tower` is "both" for what belongs to neither.
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
        """All that is paid for each sample."""
        return self.forward_macs + self.backward_macs + self.recompute_macs + self.update_macs

    def step_macs(self, batch: int) -> float:
        """All that is paid for a step of `batch` samples."""
        return batch * self.sample_macs + self.step_update_macs

    def to_json(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class JobCost:
    """What it costs to train one model: MACs per sample (a picture with its captions), per step, and in total."""

    mode: Mode
    student_forward_macs: float
    student_training_macs: float
    """Forward and backward of the student and its projectors; in `paper` mode with the optimizer's share."""
    teacher_forward_macs: float = 0.0
    recompute_macs: float = 0.0
    """What the student and the loss compute again to save memory."""
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


@dataclass(frozen=True)
class Breakdown:
    """All that the training of one model pays for, at `batch` samples a step."""

    mode: Mode
    batch: int
    records: tuple[Record, ...]

    def sum(self, *fields: str, parts: tuple[Part, ...] = ("student", "projector", "loss", "teacher")) -> float:
        """The sum of the named fields over the records of `parts`, exact to the last digit."""
        values = (getattr(record, field) for record in self.records if record.part in parts for field in fields)
        return math.fsum(values)

    @property
    def step_macs(self) -> float:
        """MACs of one step."""
        return math.fsum(record.step_macs(self.batch) for record in self.records)

    def cost(self, samples: float, steps: int) -> JobCost:
        """The same, summed up for a training of `samples` samples in `steps` steps."""
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


def backward_macs(module: str, forward: float) -> float:
    """The gradients by the weights and by the input, each as large as the forward pass; the first layer has no second.

    So it is for any matrix product, whichever of its factors are weights.
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
) -> Breakdown:
    """What this program computes in a training of `spec`. `teacher` is the model whose features are distilled, if any.

    `batch` is the global one; `tokens` are the computed ones of a caption (default: the context; each length capped at
    each model's own). Three ways of saving memory compute something again: `recompute`, where the batch of a process is
    split into micro-batches, runs the student and its projectors forward twice; `checkpointing` its blocks, in
    backward; `chunked_loss`, where a process has more rows than the loss takes at a time, the similarities. Raises
    ConfigError for lengths that cannot be.
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
        *trained("student", "both", {"logit_scale": Count(1)}, 1),
    ]
    if teacher is not None:
        for tower, one in projectors(spec, teacher).items():
            records += trained("projector", tower, {"projection": one}, 1 if tower == "image" else captions)
    similarities = contrastive_macs(batch, captions, spec.embed_dim) / batch
    again = similarities if chunked_loss else 0.0
    records.append(Record("loss", "both", "similarities", 0, similarities, 2 * similarities, again))
    if teacher is not None:
        records += frozen("image", image_tower(teacher), 1)
        records += frozen("text", text_tower(teacher, tokens), captions)
        records += frozen("both", {"logit_scale": Count(1)}, 1)
    return Breakdown("exact", batch, tuple(records))


def frozen(tower: Tower, counts: Mapping[str, Count], times: int) -> Iterator[Record]:
    """What a teacher has in `tower`: forward passes alone."""
    for module, count in counts.items():
        yield Record("teacher", tower, module, count.parameters, forward_macs=times * count.macs)


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
    """The cost of `steps` steps of this program: the sums of `exact_breakdown`, whose arguments these are."""
    breakdown = exact_breakdown(
        spec,
        teacher,
        batch=batch,
        captions=captions,
        tokens=tokens,
        recompute=recompute,
        checkpointing=checkpointing,
        chunked_loss=chunked_loss,
    )
    return breakdown.cost(steps * batch, steps)
