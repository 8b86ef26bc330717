"""One job of a run: expand, train, evaluate. Each state is on disk before the next begins."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compt.bench.profile import StepTrace
from compt.bench.throughput import peak_flops
from compt.bench.tune import trial_of, tuned, with_chosen
from compt.chain.record import MANIFEST, machine, now, read_manifest, steps_left
from compt.chain.start import hash_of, open_start
from compt.cost.counts import Tokens
from compt.cost.training import JobCost
from compt.data.account import Account
from compt.data.batch import Batch
from compt.data.index import Index
from compt.data.loaders import train_loader
from compt.dist import collectives as dist
from compt.dist.watch.thread import EVALUATING, LONG, beat
from compt.engines.compiler import forget_compiled
from compt.errors import RunError
from compt.evaluate.scorer import Scorer
from compt.expand.execute import expand
from compt.expand.plan import make_plan as make_expansion
from compt.files import flatten, write_json
from compt.models.preprocess import Preprocess
from compt.plan.jobs import Job, recipe_cost
from compt.plan.links import Start
from compt.plan.remedies import explained
from compt.recipe.engine import EngineConfig
from compt.recipe.read import largest_divisor, split_batch
from compt.recipe.schema import Recipe
from compt.train.build import Blueprint, build_training
from compt.train.checkpoint import find_latest, name_of, open_weights, remove_checkpoints
from compt.train.loggers import Logs, OpenLoggers
from compt.train.loop import TrainResult, TrainSettings, train
from compt.train.micro_batch import Trial, advise, find_micro_batch, release
from compt.train.task import DistillTask
from compt.weights.artefact import Artefact, read_artefact, write_artefact
from compt.weights.open import average_of

_log = logging.getLogger(__name__)

INITIAL_SHARD_BYTES = 200_000_000
"""Size of a file of `initial/`, in bytes of float32: small enough that several ranks have a file to write."""


@dataclass(frozen=True)
class RunContext:
    """What all jobs of a run share.

    Relative paths of the recipe start at `base`. `start` describes the model at `chain.from`. `contents`, on rank 0:
    hashes of some samples of all data, by the words that messages have for them. `profile_steps`: first and last step
    of each job that is traced.
    """

    folder: Path
    recipe: Recipe
    index: Index
    device: torch.device
    base: Path
    start: Start | None = None
    contents: Mapping[str, str] = field(default_factory=dict)
    profile_steps: tuple[int, int] | None = None

    def job_folder(self, name: str) -> Path:
        """Where the job `name` keeps its files."""
        return self.folder / "jobs" / name


class JobRun:
    """Takes one job from its state on disk to done. All ranks take every step together; rank 0 writes the manifest."""

    def __init__(self, job: Job, context: RunContext, say: Callable[[str], None]) -> None:
        self.job = job
        self.context = context
        self.say = say
        self.scorer = Scorer(context.recipe, context.base)
        self.folder = context.job_folder(job.name)
        self.manifest: dict[str, Any] = dist.from_main(lambda: read_manifest(self.folder))

    def run(self) -> None:
        """Go on from the state in the manifest. Raises what training and evaluation raise."""
        steps = {
            "planned": self._begin,
            "expanded": lambda: self._enter("training"),
            "training": self._train,
            "evaluated": self._finish,
        }
        self._check_teacher()
        if self.manifest.get("sets") not in (None, self.context.recipe.evaluation.identity()):
            self._enter("training")
        if self.manifest["state"] != "done" and not self._has_model():
            self._note_start()
        while self.manifest["state"] != "done":
            steps[self.manifest["state"]]()
        release(self.context.device)
        forget_compiled()

    def _note_start(self) -> None:
        """Note the machine that trains in the manifest, as a resumed job may have moved to another one."""
        here = {"at": now(), "machine": machine(self.context.device), "processes": dist.world_size()}
        here["engine"] = self._engine_config.name
        before = self.manifest.get("starts", [])
        if before and self.manifest["state"] == "training" and dist.is_main():
            old, new = (flatten({**start, "at": ""}) for start in (before[-1], here))
            changed = [f"{key} {old[key]} -> {new[key]}" for key in new if old.get(key, new[key]) != new[key]]
            if changed:
                _log.warning("%s: the last bits may differ, as it goes on with %s", self.job.name, ", ".join(changed))
        self.manifest["starts"] = [*self.manifest.get("starts", []), dist.broadcast_object(here)]

    def _enter(self, state: str, **values: Any) -> None:
        self.manifest = {**self.manifest, **values, "state": state}
        dist.on_main(lambda: write_json(self.folder / MANIFEST, self.manifest))

    def _check_teacher(self) -> None:
        """Raise RunError when the teacher was trained again after this job began."""
        if self.job.teacher is None or self.manifest["state"] == "planned":
            return
        teacher = self.context.job_folder(self.job.teacher)

        def compare() -> None:
            if read_manifest(teacher).get("model_hash") != self.manifest["parent_hash"]:
                raise RunError(
                    f"{self.folder}: began with another {self.job.teacher} than the one that is there now; "
                    f"remove {self.folder} to train it again"
                )

        dist.on_main(compare)

    @property
    def _parent(self) -> str | None:
        """The job, or the path, of its teacher."""
        return self.job.teacher or (str(self.job.start) if self.job.start else None)

    def _teacher(self) -> Artefact | None:
        if self.job.teacher is not None:
            folder = self.context.job_folder(self.job.teacher) / "model"
            return dist.on_all(lambda: read_artefact(folder))
        if self.job.start is not None:
            return dist.on_all(lambda: open_start(self.context.recipe.chain, self.context.base))
        return None

    def _begin(self) -> None:
        beat(0, "expanding", LONG)
        teacher = self._teacher()
        parent_hash = hash_of(teacher) if teacher else None
        if teacher is not None and self.job.expand is not None:
            plan = make_expansion(teacher.spec, self.job.spec, self.job.expand)
            average = dist.on_all(lambda: average_of(teacher)) if plan.needs_average else None
            how = {"expansion": plan.to_json(), "shard_bytes": INITIAL_SHARD_BYTES}
            self.say(f"{self.job.name}: expanding {teacher.spec.name} to {self.job.spec.name}")
            self._write_artefact(
                "initial",
                expand(plan, teacher.state, self.job.seed, average),
                parent_hash,
                {**how, "step": 0, "samples": 0, "epochs": 0.0},
                max_shard_bytes=INITIAL_SHARD_BYTES,
                together=True,
            )
        self._enter(
            "expanded",
            **self.job.to_json(),
            result=self.job.result,
            parent_hash=parent_hash,
            teacher_spec=self.job.teacher_spec and self.job.teacher_spec.to_dict(),
            started=now(),
            machine=machine(self.context.device),
            processes=dist.world_size(),
        )

    def _write_artefact(
        self,
        name: str,
        state: Mapping[str, Tensor],
        parent_hash: str | None,
        fields: Mapping[str, Any],
        **options: Any,
    ) -> None:
        job, data = self.job, self.context.recipe.data
        own = {
            "job": job.name,
            "recipe_hash": job.hash,
            "seed": job.seed,
            "parent": self._parent,
            "parent_hash": parent_hash,
        }
        manifest, preprocess = {**own, **fields}, Preprocess(data.mean, data.std)
        write_artefact(self.folder / name, state, job.spec, manifest, preprocess=preprocess, **options)

    @property
    def _engine_config(self) -> EngineConfig:
        """The engine's settings on this device, with those that `engine.tune` has chosen."""
        config = self.context.recipe.engine_of(self.job.spec.name)
        return with_chosen(config, self.manifest.get("tuned")).on(self.context.device.type)

    def _initial(self) -> Mapping[str, Tensor] | None:
        """The expanded weights that training begins with; None where they are drawn from the seed instead."""
        return None if self.job.expand is None else dist.on_all(lambda: read_artefact(self.folder / "initial")).state

    def _origin(self) -> dict[str, Any]:
        """How the initial weights were expanded, for the manifest of the trained model."""
        if self.job.expand is None:
            return {}
        initial = dist.on_all(lambda: read_artefact(self.folder / "initial", verify=False))
        kept: dict[str, Any] = {
            key: initial.manifest[key] for key in ("expansion", "shard_bytes") if key in initial.manifest
        }
        return {**kept, "initial_hash": initial.hash}

    @property
    def _logs(self) -> Logs:
        return Logs(tuple(self._engine_config.loggers), self.context.recipe.name, self.job.name, self.job.result)

    def _settings(self, micro: int) -> TrainSettings:
        recipe, job, images = self.context.recipe, self.job, self.context.index.images
        optimizer, engine, every = recipe.optimizer, self._engine_config, recipe.evaluation.every
        return TrainSettings(
            total_steps=job.steps,
            warmup_steps=job.warmup_steps,
            batch=optimizer.batch,
            micro_batch=micro,
            steps_per_epoch=images // optimizer.batch,
            lr=job.lr,
            schedule=optimizer.schedule,
            clip_grad_norm=optimizer.clip_grad_norm,
            max_nonfinite=optimizer.max_nonfinite,
            log_every=max(1, engine.log_every.to_steps(images, optimizer.batch)),
            checkpoint_every=max(1, engine.checkpoint_every.to_steps(images, optimizer.batch)),
            evaluate_every=max(1, every.to_steps(images, optimizer.batch)) if every else None,
            keep_checkpoints=engine.keep_checkpoints,
            keep_every=max(1, engine.keep_every.to_steps(images, optimizer.batch)) if engine.keep_every else None,
            async_checkpoints=engine.async_checkpoints,
            mean=recipe.data.mean,
            std=recipe.data.std,
            identity={"recipe": job.hash, "data": self.context.index.fingerprint},
            logs=self._logs,
            captions=recipe.data.captions,
            text_buckets=engine.buckets,
            macs=lambda result: self._cost(result, micro).total_macs,
            peak_flops=peak_flops(self.context.device, optimizer.precision),
            useful_macs=self._useful_macs,
        )

    def _loader(self, start_step: int) -> Iterable[Batch]:
        recipe = self.context.recipe
        return train_loader(
            self.context.index,
            seed=self.job.order_seed,
            batch=recipe.optimizer.batch,
            image_size=self.job.spec.image_size,
            captions=recipe.data.captions,
            context_length=self.job.spec.context_length,
            crop_scale=recipe.data.crop_scale,
            crop_ratio=recipe.data.crop_ratio,
            augment=recipe.data.augment,
            decoder=recipe.data.decoder,
            window=recipe.data.shuffle_shards,
            start_step=start_step,
            total_steps=self.job.steps,
            rank=dist.rank(),
            world_size=dist.world_size(),
            workers=self._engine_config.workers,
            max_bad_share=recipe.data.max_bad_share,
            cache=self._engine_config.cache,
        )

    def _fit(self) -> None:
        """Train from the newest checkpoint, the expanded or the fresh weights, and write `model/`."""
        beat(0, "opening the model", LONG)
        origin = self._origin()
        config = self.context.recipe.engine_of(self.job.spec.name)
        searches = config.tune or config.find_micro_batch
        searches = searches and dist.from_main(lambda: steps_left(self.job, self.folder)) > 0
        if searches and config.tune:
            self._tune()
        settings = self._settings(self._micro_batch(searches))
        with explained(lambda: advise(self.job, self.context.recipe, self.context.device, settings.micro_batch)):
            result = self._run_steps(settings)
        if lost := Account(unused=Counter(result.skipped_samples)).line():
            self.say(f"{self.job.name}: left out or replaced while training: {lost}")
        release(self.context.device)  # scoring needs the engine's memory
        beat(result.steps, "writing the model", LONG)
        # From the last checkpoint: each process reads only what it writes, so that none holds the whole model.
        last = self._last_checkpoint(result.steps)
        fields = {
            **origin,
            "step": result.steps,
            "samples": result.samples,
            "epochs": self.job.epochs,
            "trained": asdict(result),
            # Noted here, as a later start may have other settings and processes, and train nothing.
            "cost": self._cost(result, settings.micro_batch).to_json(),
            "data_fingerprint": self.context.index.fingerprint,
        }
        self._write_artefact(
            "model",
            open_weights(last),
            self.manifest["parent_hash"],
            fields,
            extra_states={"ema": open_weights(last, average=True)} if self.context.recipe.optimizer.ema else None,
            together=True,
        )

    def _last_checkpoint(self, step: int) -> Path:
        """The checkpoint of the last step. Raises RunError, on all ranks, when it was damaged since it was written."""
        folder = self.folder / "checkpoints"
        path = dist.from_main(lambda: find_latest(folder))
        if path is None or path.name != name_of(step):
            text = (
                f"{folder / name_of(step)}: the checkpoint of the last step is damaged or gone; start the same command "
            )
            dist.agree(RunError(text + f"again to go on from {path.name if path else 'the beginning'}"))
        assert path is not None
        return path

    def _run_steps(self, settings: TrainSettings) -> TrainResult:
        teacher = self._teacher() if self.job.active_teacher else None
        task, engine = build_training(
            replace(Blueprint.of(self.job, self.context.recipe, self.context.base), engine=self._engine_config),
            self.context.device,
            self._initial(),
            teacher.state if teacher else None,
        )
        # Not in `build_training`: timings and searches have the teacher compute every caption, as a first epoch does.
        if self._engine_config.teacher_cache and isinstance(task, DistillTask):
            task.keep_captions(self._engine_config.teacher_cache)
        wanted = self.context.profile_steps
        trace = StepTrace(task, engine, wanted, self.folder, self.say) if wanted else None
        with trace or contextlib.nullcontext():
            return train(
                task,
                engine,
                settings,
                self.folder,
                self._loader,
                (lambda: self.scorer.during_training(task.model)) if self.scorer.looks_on else None,
                self.job.name,
                trace or (lambda step: None),
            )

    def _tune(self) -> None:
        """Choose the fastest settings, or take those of an earlier start on the same machine; the manifest has them."""
        trial = trial_of(self.job, self.context.recipe, self.context.base, self.context.device)
        found = tuned(trial, self.manifest.get("tuned"))
        for line in found.lines():
            self.say(f"{self.job.name}: {line}")
        self._enter("training", tuned=asdict(found))

    def _micro_batch(self, search: bool) -> int:
        """Images that a process computes at once: as configured, or the most that fit, which the manifest notes."""
        config, starts = self._engine_config, self.manifest["starts"]
        tuned = config.tune and not search
        batch, ranks = self.context.recipe.optimizer.batch, dist.world_size()
        share, micro = split_batch(batch, ranks, None if tuned else config.micro_batch)
        if tuned:
            # It may have been chosen on another number of ranks. No step is left that it could change.
            micro = largest_divisor(share, min(config.micro_batch or share, share))
        if not config.find_micro_batch or config.tune:
            return micro
        if search:
            found = find_micro_batch(Trial.of(self.job, self.context.recipe, self.context.base, self.context.device))
            self.say(f"{self.job.name}: {found} images of a process fit into memory at once")
            starts[-1]["micro_batch"] = found
            self._enter("training")
        # Without a step left nothing is searched: those steps had what an earlier start found.
        return next((start["micro_batch"] for start in reversed(starts) if "micro_batch" in start), micro)

    def _has_model(self) -> bool:
        return dist.any_true((self.folder / "model").exists())

    def _train(self) -> None:
        """Train unless `model/` is there already, then score it."""
        if not self._has_model():
            self._fit()
        beat(self.job.steps, EVALUATING, LONG)
        artefact, job = dist.on_all(self._trained), self.job
        # Training has closed its loggers, or a resume has skipped it. They are open while the job is scored: a job
        # whose scoring fails has failed.
        with OpenLoggers(self._logs, self.folder, job.steps) as loggers:
            self._enter(
                "evaluated",
                trained=artefact.manifest["trained"],
                # The model of a former compt does not say: the manifest keeps what it has.
                cost=artefact.manifest.get("cost", self.manifest["cost"]),
                model_hash=artefact.hash,
                **self._scored(artefact),
                sets=self.context.recipe.evaluation.identity(),
            )
            manifest = self.manifest
            final = {**manifest["scores"], **{key: manifest[key] for key in ("validation_loss",) if key in manifest}}
            loggers.finish(job.steps, final, self.folder / "scores" / "contact.npz")

    def _scored(self, artefact: Artefact) -> dict[str, Any]:
        """Scores for the manifest. Each rank loads the whole model, unless there is nothing to score."""
        if not (self.scorer.looks_on or self.context.recipe.evaluation.sets):
            return {"scores": {}}
        self.say(f"{self.job.name}: evaluating")
        model = artefact.load_model(self.context.device)
        return {"scores": self.scorer.at_the_end(model, self.folder / "scores"), **self.scorer.held_out_loss(model)}

    def _trained(self) -> Artefact:
        """This job's model. Raises RunError if another recipe or other data trained it."""
        artefact = read_artefact(self.folder / "model")
        made = (artefact.manifest.get("recipe_hash"), artefact.manifest.get("data_fingerprint"))
        if made != (self.job.hash, self.context.index.fingerprint):
            raise RunError(
                f"{artefact.path}: comes from another recipe or other data; remove {self.folder} to train it again"
            )
        return artefact

    def _cost(self, result: TrainResult, micro_batch: int) -> JobCost:
        """What the steps until `result` cost: with captions as measured, and no teacher for those that its cache had.

        All steps count as if these processes had made them with `micro_batch`, also those before a resume.
        """
        job, recipe, hits = self.job, self.context.recipe, result.teacher_hits
        return recipe_cost(
            recipe,
            job.spec,
            job.active_teacher,
            result.steps,
            dist.world_size(),
            result.tokens_per_caption,
            engine=self._engine_config.model_copy(update={"micro_batch": micro_batch}),
            teacher_share=1 - hits / (result.samples * recipe.data.captions),
            teacher_tokens=result.teacher_tokens_per_caption if hits and result.teacher_misses else None,
        )

    def _useful_macs(self, tokens: Tokens, teacher_share: float = 1.0) -> float:
        """MACs that a sample needs, with captions of `tokens` tokens, without what is computed twice to save memory.

        The teacher computes `teacher_share` of the captions.
        """
        job, recipe = self.job, self.context.recipe
        return recipe_cost(
            recipe, job.spec, job.active_teacher, 1, 1, tokens, again=False, teacher_share=teacher_share
        ).sample_macs

    def _finish(self) -> None:
        dist.on_main(lambda: remove_checkpoints(self.folder / "checkpoints"))
        self._enter("done", finished=now())
