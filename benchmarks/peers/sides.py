"""The training step of compt and those of its peers, from the same weights and on the same batch.

`OpenClip` runs OpenCLIP's own `train_one_epoch` on its own model, loss and optimizer. `Authors` is a plain loop over
the same model, written from the paper. Both compute every caption in its whole context.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.nn import functional

from compt.data.batch import Batch
from compt.engines.base import AdamWSettings, Precision
from compt.models.clip import build
from compt.models.pixels import to_input
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, ModelSpec
from compt.models.scalars import exported_shape
from compt.recipe.chain import Distill
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.build import Blueprint, build_training
from compt.train.loop import training_step

SEED = 0
LEARNING_RATE = 1e-3
ALPHA = 500.0
PRECISIONS: dict[Precision, str] = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}
"""OpenCLIP's `--precision` for each of compt's."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = AdamWSettings()


@dataclass(frozen=True)
class Captions:
    """`each` captions an image, of up to `context` tokens: log-normal lengths, or all as long as the context.

    `logarithm` is the mean and the deviation of the logarithm of a length.
    """

    title: str
    each: int
    context: int
    logarithm: tuple[float, float] | None

    def tokens(self, images: int, vocabulary: int) -> Tensor:
        """Tokens int64 [images, each, context]; each caption ends with the end of text and zeros."""
        generator = torch.Generator().manual_seed(SEED)
        lengths = torch.full((images, self.each, 1), self.context)
        if self.logarithm is not None:
            drawn = torch.empty(images, self.each, 1).log_normal_(*self.logarithm, generator=generator)
            lengths = drawn.round().clamp(4, self.context).long()
        tokens = torch.randint(1, vocabulary - 2, (images, self.each, self.context), generator=generator)
        places = torch.arange(self.context)
        return tokens.masked_fill(places >= lengths, 0).masked_fill(places == lengths - 1, vocabulary - 1)


@dataclass(frozen=True)
class Case:
    """A job to compare: a model alone, or with the features of a teacher of equal embedding width."""

    student: ModelSpec
    teacher: ModelSpec | None
    captions: Captions
    batch: int
    precision: Precision

    @property
    def name(self) -> str:
        """As in the names of the GPU suite: model, or model<teacher."""
        return self.student.name + (f"<{self.teacher.name}" if self.teacher else "")

    def data(self) -> Batch:
        """Random uint8 pixels and captions, on the CPU."""
        size = self.student.image_size
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randint(0, 256, (self.batch, 3, size, size), generator=generator, dtype=torch.uint8)
        return Batch(images, self.captions.tokens(self.batch, self.student.vocab_size), [""] * self.batch)

    def weights(self) -> dict[ModelSpec, dict[str, Tensor]]:
        """First values of the models, which every side starts from."""
        specs = [spec for spec in (self.student, self.teacher) if spec is not None]
        return {spec: build(spec, seed=SEED).state_dict() for spec in specs}


Weights = Mapping[ModelSpec, Mapping[str, Tensor]]


class Clock:
    """Seconds: on a GPU of the wall, after it has finished; on a CPU of all threads, which other load changes less."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Side:
    """Trains one model. `run` takes one step."""

    def __init__(self, case: Case, data: Batch, device: torch.device) -> None:
        self.case, self.device, self.clock = case, device, Clock(device)
        self.data = data.pin_memory() if device.type == "cuda" else data

    def step(self) -> Tensor:
        """Forward, backward and update; returns the loss."""
        raise NotImplementedError

    def run(self) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        started = self.clock()
        loss = self.step()
        return self.clock() - started, float(loss)


class Own(Side):
    """The step of compt's trainer."""

    def __init__(self, case: Case, data: Batch, device: torch.device, weights: Weights, engine: EngineConfig) -> None:
        super().__init__(case, data, device)
        optimizer = Optimizer(precision=case.precision, batch=case.batch)
        blueprint = Blueprint(
            student=case.student,
            teacher=case.teacher,
            distill=Distill(alpha=ALPHA),
            optimizer=optimizer,
            engine=engine,
            seed=SEED,
        )
        teacher = weights[case.teacher] if case.teacher else None
        self._task, self._engine = build_training(blueprint, device, weights[case.student], teacher)
        self._task.module.train()

    def step(self) -> Tensor:
        """As `compt chain` takes it, without loading data."""
        report, _ = training_step(
            self._task,
            self._engine,
            self.data,
            lr=LEARNING_RATE,
            micro_batch=len(self.data),
            clip_grad_norm=None,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
        )
        return report["loss"]


class Peer(Side):
    """What both peers have: OpenCLIP's model and optimizer, and images as its loader gives them."""

    def __init__(self, case: Case, data: Batch, device: torch.device, weights: Weights, *, fused: bool) -> None:
        super().__init__(case, data, device)
        pixels = to_input(data.images, OPENAI_MEAN, OPENAI_STD)
        self.images = pixels.pin_memory() if device.type == "cuda" else pixels
        self.tokens = self.data.tokens.flatten(0, 1)
        self.model = stock_model(case.student, weights[case.student], device, case.precision)
        self.teacher = None
        if case.teacher is not None:
            self.teacher = stock_model(case.teacher, weights[case.teacher], device, case.precision).eval()
        self.optimizer = stock_optimizer(self.model, fused)
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type) if case.precision == "fp16" else None


def stock_model(
    spec: ModelSpec, weights: Mapping[str, Tensor], device: torch.device, precision: Precision
) -> nn.Module:
    """OpenCLIP's model of these sizes and weights, from its `create_model`."""
    with tempfile.TemporaryDirectory(prefix="compt-peers-") as folder:
        config = {"model_cfg": spec.open_clip_config(), "preprocess_cfg": {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        logging.disable(logging.WARNING)  # it warns that there are no pretrained weights
        try:
            model: nn.Module = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                precision=PRECISIONS[precision],
                device=device,
                output_dict=True,
            )
        finally:
            logging.disable(logging.NOTSET)
    model.load_state_dict({name: value.reshape(exported_shape(name, value.shape)) for name, value in weights.items()})
    return model


def stock_optimizer(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    """AdamW with the groups of OpenCLIP's `main`; `fused` is torch's faster kernel, which OpenCLIP does not ask for."""
    rest: list[Tensor] = []
    gain_or_bias: list[Tensor] = []
    for name, parameter in model.named_parameters():
        exclude = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        (gain_or_bias if exclude else rest).append(parameter)
    groups = [{"params": gain_or_bias, "weight_decay": 0.0}, {"params": rest, "weight_decay": SETTINGS.weight_decay}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=SETTINGS.betas, eps=SETTINGS.eps, fused=fused or None)


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """The distillation loss of a tower, of features of length one (CoM-PT, section 3.2; alpha is quoted at 512)."""
    return ALPHA * teacher.shape[-1] / 512 * functional.mse_loss(student, teacher)


class _SlotLoss(ClipLoss):
    """OpenCLIP's loss of each caption slot, averaged; with a teacher, the distance of its features."""

    total: Tensor

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        slots = text_features.unflatten(0, (len(image_features), -1)).unbind(1)
        contrastive: Any = sum(super(_SlotLoss, self).forward(image_features, one, logit_scale) for one in slots)
        found = {"contrastive_loss": contrastive / len(slots)}
        if dist_image_features is not None and dist_text_features is not None:
            pairs = ((dist_image_features, image_features), (dist_text_features, text_features))
            found["distill_loss"] = torch.stack([distance(*pair) for pair in pairs]).mean()
        self.total = torch.stack([*found.values()]).sum().detach()
        return found


class OpenClip(Peer):
    """OpenCLIP's `train_one_epoch`, on an epoch of one batch.

    OpenCLIP takes one caption an image. Here it gets all captions as texts, and its loss for each slot. The clock runs
    from where its loop takes the batch to where it asks for the next one.
    """

    def __init__(self, case: Case, data: Batch, device: torch.device, weights: Weights, *, fused: bool) -> None:
        super().__init__(case, data, device, weights, fused=fused)
        self._loss = _SlotLoss(cache_labels=True)
        self._seconds = math.nan
        self._args = SimpleNamespace(
            device=self.device,
            precision=PRECISIONS[self.case.precision],
            distill=self.teacher is not None,
            accum_freq=1,
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=None,
            rank=1,  # rank 0 reads the losses for its log in every step
            world_size=1,
            batch_size=self.case.batch,
            log_every_n_steps=1,
            wandb=False,
        )
        loader = SimpleNamespace(num_batches=1, num_samples=self.case.batch)
        self._data = {"train": SimpleNamespace(dataloader=_Loader(self, loader), set_epoch=lambda epoch: None)}

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The one batch; keeps the seconds that its step takes."""
        started = self.clock()
        yield self.images, self.tokens
        self._seconds = self.clock() - started

    def run(self) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        train_one_epoch(
            self.model, self._data, self._loss, 0, self.optimizer, self.scaler, None, self.teacher, self._args
        )
        return self._seconds, float(self._loss.total)


class _Loader:
    """As much of a loader as OpenCLIP's loop looks at."""

    def __init__(self, side: OpenClip, sizes: SimpleNamespace) -> None:
        self._side = side
        self.num_batches, self.num_samples = sizes.num_batches, sizes.num_samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._side.batches()


class Authors(Peer):
    """A plain step with the settings of the paper (sections 3.2 and 4, Table C): AMP, AdamW, captions padded to 77."""

    def step(self) -> Tensor:
        """Forward, backward and update; returns the loss."""
        images = self.images.to(self.device, non_blocking=True)
        tokens = self.tokens.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, DTYPES.get(self.case.precision), enabled=self.case.precision in DTYPES):
            found = self.model(images, tokens)
            loss = _paper_loss(found["image_features"], found["text_features"], found["logit_scale"])
            if self.teacher is not None:
                with torch.no_grad():
                    known = self.teacher(images, tokens)
                towers = ("image_features", "text_features")
                loss = loss + sum(distance(known[tower], found[tower]) for tower in towers) / 2
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator]
        return loss.detach()


def _paper_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The task loss of N images, features [N, D] and [N * M, D] of length one, as section 3.2 writes it."""
    count = len(image)
    logits = scale * torch.einsum("id,kjd->ijk", image, text.unflatten(0, (count, -1)))
    labels = torch.arange(count, device=image.device)[:, None].expand(count, logits.shape[1])
    to_text = functional.cross_entropy(logits.permute(0, 2, 1), labels)
    to_image = functional.cross_entropy(logits.permute(2, 0, 1), labels)
    return (to_image + to_text) / 2


PEERS: dict[str, Callable[[Case, Batch, torch.device, Weights], Side]] = {
    "OpenCLIP": lambda *given: OpenClip(*given, fused=False),
    "OpenCLIP, fused AdamW": lambda *given: OpenClip(*given, fused=True),
    "authors' settings": lambda *given: Authors(*given, fused=False),
}
"""The peers by name."""
