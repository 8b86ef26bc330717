"""From a recipe to its jobs: what is trained, from what, for how many steps, at what cost.

An impossible chain is an error here, before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from compt.cost.counts import Tokens, parameters
from compt.cost.published import paper_cost
from compt.cost.training import JobCost, Mode, exact_breakdown
from compt.errors import ConfigError
from compt.files import hash_json
from compt.models.growth import ExpandConfig, check_config, grown_spec
from compt.models.preprocess import Preprocess
from compt.models.presets import ModelSpec
from compt.plan.links import Start, averaging, check_growth, check_start, check_vocabulary, planned_start
from compt.recipe.chain import Link
from compt.recipe.engine import EngineConfig
from compt.recipe.expansion import expand_result, expansion
from compt.recipe.schema import Recipe
from compt.recipe.types import Duration

Kind = Literal["link", "baseline", "control", "try"]

ORDER_SEEDS = 1000
"""Seeds of order that each seed of a recipe has, one for each position in a chain."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to train.

    `teacher` names the job whose model this one is expanded and distilled from; for the first link with `chain.from`,
    `start` is where that model is instead. A job with neither starts from scratch; one with either has `expand`, and
    the eps of norms that go with it in `spec`, unless its first weights are random. `samples` are images seen,
    `epochs` passes over the data. `alpha`, the weight of distillation quoted for 512 features, is 0 without a teacher.
    `result` holds all that determines the weights, without names and paths. `same_as` names an earlier job that trains
    this very model, which is then not trained twice. `order_seed` draws order, captions and crops: another for each
    link, so that none sees its teacher's draws again. A try is a link of a first-pair test that was not lossless.
    """

    name: str
    kind: Kind
    spec: ModelSpec
    teacher: str | None = None
    start: Path | None = None
    teacher_spec: ModelSpec | None = None
    steps: int
    warmup_steps: int
    samples: int
    epochs: float
    lr: float
    alpha: float = 0.0
    seed: int
    order_seed: int
    cost: JobCost = field(repr=False)
    result: dict[str, Any] = field(repr=False)
    same_as: str | None = None
    expand: ExpandConfig | None = None

    @property
    def active_teacher(self) -> ModelSpec | None:
        """The model that this job distils from: None without a teacher, and with an alpha of 0."""
        return self.teacher_spec if self.alpha else None

    @property
    def hash(self) -> str:
        """Digest of `result`, which guards a resume."""
        return hash_json(self.result)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for files and reports."""
        names = ("name", "kind", "teacher", "steps", "warmup_steps", "samples", "epochs", "lr", "alpha", "seed")
        return {
            **{name: getattr(self, name) for name in (*names, "order_seed")},
            "start": str(self.start) if self.start else None,
            "same_as": self.same_as,
            "spec": self.spec.to_dict(),
            "expand": self.expand and self.expand.to_dict(),
            "parameters": parameters(self.spec),
            "cost": self.cost.to_json(),
            "hash": self.hash,
        }


@dataclass(frozen=True)
class Plan:
    """The jobs of a recipe in the order in which they run, and what its baselines cost."""

    recipe: Recipe
    jobs: tuple[Job, ...]
    images: int
    individual: tuple[Job, ...]
    """For each link its baseline (first seed), planned or not; empty without `baselines`."""

    @property
    def links(self) -> list[Job]:
        """The chain alone."""
        return [job for job in self.jobs if job.kind == "link"]

    def job(self, name: str) -> Job:
        """The job called `name`."""
        return next(job for job in self.jobs if job.name == name)

    def cost(self, job: Job, mode: Mode = "exact") -> JobCost:
        """What `job` costs; `paper` counts images times epochs, `exact` what is left without partial batches."""
        if mode == "exact":
            return job.cost
        return paper_cost(job.spec, job.active_teacher, samples=job.epochs * self.images, steps=job.steps)

    def acceleration(self, mode: Mode = "exact") -> float | None:
        """How many times cheaper the whole chain is than its baselines; None without `baselines`."""
        value = self.rows(mode)[len(self.links) - 1]["accumulated_speedup"]
        return None if value is None else float(value)

    def rows(self, mode: Mode = "exact") -> list[dict[str, Any]]:
        """The MACs of each job; of links also the speed-up over `baselines` (or None), alone and with those before."""
        rows = []
        chain = alone = 0.0
        for at, job in enumerate(self.jobs):
            cost = self.cost(job, mode)
            row: dict[str, Any] = {
                "student_forward_macs": cost.student_forward_macs,
                "student_training_macs": cost.student_training_macs,
                "teacher_forward_macs": cost.teacher_forward_macs,
                "teacher_share": cost.samples * cost.teacher_forward_macs / cost.total_macs,
                "total_macs": cost.total_macs,
                **dict.fromkeys(("accumulated_macs", "baseline_macs", "speedup", "accumulated_speedup")),
            }
            if job.kind == "link":
                baseline = self.cost(self.individual[at], mode).total_macs if self.individual else None
                chain += cost.total_macs
                alone += baseline or 0.0
                row |= {
                    "accumulated_macs": chain,
                    "baseline_macs": baseline,
                    "speedup": baseline / cost.total_macs if baseline else None,
                    "accumulated_speedup": alone / chain if baseline else None,
                }
            rows.append(row)
        return rows


def make_plan(
    recipe: Recipe,
    *,
    baselines: bool = False,
    controls: Sequence[str] | None = None,
    images: int | None = None,
    world_size: int = 1,
    start: Start | None = None,
    scales: Sequence[float] = (),
    base: Path = Path(),
    source: str = "recipe",
) -> Plan:
    """The links of the chain in order, then the baselines, then the controls of the last link.

    `controls` default to the recipe's; () for none. `images` replaces the recipe's number with the one found.
    `world_size` only decides whether micro-batches are recomputed, which enters the cost. `start` describes the model
    at `chain.from`; by default its manifest is read, relative to `base`. `scales` are those of a first-pair test: each
    multiplies the lengths of all links that grow from another model, at most to those of their baselines; the last one
    holds, those before it were tried. With them the baseline of the first such link is always planned. `source` is the
    recipe's file, for messages.
    Raises ConfigError for a chain that cannot be trained.
    """
    try:
        if recipe.chain.from_ is not None and start is None:
            start = planned_start(recipe.chain, base)
        return _Planner(recipe, images, world_size).plan(baselines, controls, start, scales)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def asked_controls(recipe: Recipe, baselines: bool, controls: bool, source: str) -> tuple[()] | None:
    """What two options mean as `controls` of `make_plan`. Raises ConfigError for `controls` if the recipe has none."""
    if controls and not (recipe.baselines and recipe.baselines.controls):
        raise ConfigError(f"{source}: baselines.controls: is missing; it names the controls, such as [equal_macs]")
    return None if controls or baselines else ()


class _Planner:
    """Makes the jobs of one recipe."""

    def __init__(self, recipe: Recipe, images: int | None, world_size: int) -> None:
        self.recipe = recipe
        self.images = recipe.data.images if images is None else images
        self.batch = recipe.optimizer.batch
        if self.images < self.batch:
            raise ConfigError(f"optimizer.batch = {self.batch}: there are only {self.images} images (data.images)")
        self.specs = recipe.specs()
        self.world_size = world_size

    def plan(
        self, baselines: bool, controls: Sequence[str] | None, start: Start | None, scales: Sequence[float]
    ) -> Plan:
        jobs = self.links(start, scales[-1] if scales else 1.0)
        settings = self.recipe.baselines
        individual: list[Job] = []
        if settings:
            seeds = settings.seeds or [self.recipe.seed]
            individual = [self.baseline(self.specs[link.spec.name], seeds[0]) for link in jobs]
            if baselines:
                jobs = jobs + [self.baseline(one.spec, seed) for one in individual for seed in seeds]
            elif scales:
                jobs = [*jobs, individual[first_student(self.recipe)]]
        elif baselines or scales:
            raise ConfigError("baselines: is missing; it says how the baselines are trained")
        if controls is None:
            controls = settings.controls if settings else ()
        elif controls and not settings:
            raise ConfigError("baselines: is missing; controls take their warm-up from it")
        last = len(self.recipe.chain.links) - 1
        jobs = jobs + [self.control(kind, jobs[: last + 1]) for kind in controls]
        jobs = jobs + [self.tried(number, scale, start) for number, scale in enumerate(scales[:-1], 1)]
        return Plan(self.recipe, _once(jobs), self.images, tuple(individual))

    def links(self, start: Start | None, scale: float) -> list[Job]:
        chain = self.recipe.chain
        jobs: list[Job] = []
        if start is not None:
            if chain.from_ is None:
                raise ConfigError("chain.from: is missing, but a model to start from was given")
            self.check_colours(start)
        for at, link in enumerate(chain.links):
            own = self.scale(link, scale) if at >= first_student(self.recipe) else 1.0
            steps, warmup = self.steps(f"chain.links.{at}", link.train, link.warmup, own)
            jobs.append(self.link(at, link, steps, warmup, jobs[-1] if jobs else start))
        return jobs

    def expansion(self, at: int, teacher: Job | Start) -> ExpandConfig | None:
        """How a link grows from its teacher, if it does. Raises ConfigError where it cannot."""
        chain = self.recipe.chain
        link = chain.links[at]
        student, config = self.specs[link.model], expansion(chain.expand, link.expand)
        try:
            if isinstance(teacher, Start):
                check_vocabulary(teacher.spec)
            if link.initial == "random":
                return None
            (check_start if isinstance(teacher, Start) else check_growth)(teacher.spec, student)
            check_config(teacher.spec, student, config)
        except ConfigError as error:
            raise ConfigError(f"chain.links.{at}.model = '{link.model}': {error}") from None
        averaged = teacher.averaged if isinstance(teacher, Start) else self.recipe.optimizer.ema is not None
        towers = averaging(teacher.spec, student, config)
        if towers and averaged is False:
            key = f"chain.links.{at}.expand" if link.expand else "chain.expand"
            lacks = "set optimizer.ema"
            if isinstance(teacher, Start):
                lacks = f"there is none at chain.from = '{chain.from_}'"
            raise ConfigError(
                f"{key}: depth {config.tower(towers[0]).depth} fills the layers that '{link.model}' adds to its "
                f"{towers[0]} tower from the moving average of the weights that it grows from; {lacks}"
            )
        return config

    def check_colours(self, start: Start) -> None:
        data = self.recipe.data
        own = Preprocess(data.mean, data.std)
        for key, (wanted, found) in own.differs(start.preprocess or own).items():
            if key in ("mean", "std"):
                raise ConfigError(
                    f"data.{key} = {list(wanted)}: the model at chain.from was trained with {list(found)}, "
                    "and would be shown other colours"
                )
            raise ConfigError(
                f"chain.from: its model expects {key} {found}, and a chain has {wanted}; to use it all the same, write "
                f"it with `compt export` and set preprocess_cfg.{key} to {wanted} in open_clip_config.json"
            )

    def tried(self, number: int, scale: float, start: Start | None) -> Job:
        link = self.links(start, scale)[first_student(self.recipe)]
        return replace(link, name=try_name(number, link.spec.name), kind="try")

    def scale(self, link: Link, scale: float) -> float:
        """`scale`, as far as it does not make a link longer than its baseline: that would be no acceleration."""
        if self.recipe.baselines is None:
            return scale
        whole, own = (one.train.to_steps(self.images, self.batch) for one in (self.recipe.baselines, link))
        return min(scale, max(1.0, whole / max(1, own)))  # a link without a step is an error of `steps`

    def steps(self, key: str, train: Duration, warmup: Duration, scale: float = 1.0) -> tuple[int, int]:
        steps, warmup_steps = (round(scale * length.to_steps(self.images, self.batch)) for length in (train, warmup))
        if steps < 1:
            times = "" if scale == 1 else f" x {scale:.3g}"
            raise ConfigError(f"{key}.train = {train}{times}: is less than one step, at {self.batch} images per step")
        if warmup_steps > steps:
            raise ConfigError(
                f"{key}.warmup = {warmup}: {warmup_steps} steps are longer than the training, {train} = {steps} steps"
            )
        return steps, warmup_steps

    def link(self, at: int, link: Link, steps: int, warmup: int, teacher: Job | Start | None) -> Job:
        name = f"{at + 1}-{link.model}"
        chain = self.recipe.chain
        alpha = chain.distill.alpha if link.alpha is None else link.alpha
        # A model from outside stands before the first link, as if it were one.
        position = at + (self.recipe.chain.from_ is not None)
        job = self.scratch(name, "link", self.specs[link.model], steps, warmup, self.recipe.seed, link.lr, position)
        if teacher is None:
            return job
        config = self.expansion(at, teacher)
        result = {
            **job.result,
            "teacher": teacher.hash,
            **({"expand": expand_result(config)} if config else {"initial": link.initial}),
            "distill": {**chain.distill.result_fields(), "alpha": alpha},
        }
        if isinstance(teacher, Start) and chain.from_prefix is not None:
            result["from_prefix"] = chain.from_prefix
        return replace(
            job,
            # The eps of its norms follows from teacher and expansion: `result` has the model as it is asked for.
            spec=grown_spec(teacher.spec, job.spec, config) if config else job.spec,
            teacher=teacher.name if isinstance(teacher, Job) else None,
            start=None if isinstance(teacher, Job) else Path(str(chain.from_)),
            teacher_spec=teacher.spec,
            alpha=alpha,
            cost=self.cost(job.spec, teacher.spec if alpha else None, steps),
            result=result,
            expand=config,
        )

    def baseline(self, spec: ModelSpec, seed: int) -> Job:
        settings = self.recipe.baselines
        assert settings is not None
        steps, warmup = self.steps("baselines", settings.train, settings.warmup)
        lr = settings.lr.get(spec.name)
        return self.scratch(f"baseline-{spec.name}-s{seed}", "baseline", spec, steps, warmup, seed, lr)

    def control(self, kind: str, links: Sequence[Job]) -> Job:
        """The last model from scratch: for as many steps as its link, or for the MACs of its link or of all links.

        MACs include the teachers' forward passes. They are taken without what is computed again to save memory, so that
        this changes no result. Warm-up and learning rate are those of a training from scratch.
        """
        settings = self.recipe.baselines
        assert settings is not None
        link = links[-1]
        steps = link.steps
        if kind != "equal_epochs":
            paid = links if kind == "equal_chain_macs" else links[-1:]
            wanted = sum(self.cost(job.spec, job.active_teacher, job.steps, again=False).total_macs for job in paid)
            steps = round(wanted / self.cost(link.spec, None, 1, again=False).total_macs)
        warmup = min(steps, settings.warmup.to_steps(self.images, self.batch))
        spec = self.specs[link.spec.name]
        return self.scratch(f"control-{kind}", "control", spec, steps, warmup, link.seed, settings.lr.get(spec.name))

    def scratch(
        self,
        name: str,
        kind: Kind,
        spec: ModelSpec,
        steps: int,
        warmup: int,
        seed: int,
        lr: float | None = None,
        position: int = 0,
    ) -> Job:
        recipe = self.recipe
        lr = recipe.optimizer.lr if lr is None else lr
        seeds: dict[str, Any] = {"seed": seed, "order_seed": seed * ORDER_SEEDS + position}
        model = spec.to_dict()
        del model["name"]
        return Job(
            name=name,
            kind=kind,
            spec=spec,
            steps=steps,
            warmup_steps=warmup,
            samples=steps * self.batch,
            epochs=steps / (self.images // self.batch),
            lr=lr,
            **seeds,
            cost=self.cost(spec, None, steps),
            # What determines the weights, and nothing else: a change of speed or name must not train the job again.
            result={
                "model": model,
                "data": {**recipe.data.result_fields(), "images": self.images},
                "optimizer": {**recipe.optimizer.result_fields(), "lr": lr},
                "steps": steps,
                "warmup_steps": warmup,
                **seeds,
            },
        )

    def cost(self, spec: ModelSpec, teacher: ModelSpec | None, steps: int, *, again: bool = True) -> JobCost:
        tokens = self.recipe.data.caption_tokens
        return recipe_cost(self.recipe, spec, teacher, steps, self.world_size, tokens, again=again)


def recipe_cost(
    recipe: Recipe,
    spec: ModelSpec,
    teacher: ModelSpec | None,
    steps: int,
    world_size: int,
    tokens: Tokens,
    *,
    again: bool = True,
    engine: EngineConfig | None = None,
    teacher_share: float = 1.0,
    teacher_tokens: Tokens = None,
) -> JobCost:
    """What `steps` steps of a recipe cost with captions of `tokens` on `world_size` processes.

    `engine`: the settings that run, where they are not the recipe's. `again` charges what is computed twice to save
    memory: blocks, with `engine.recompute`; micro-batches and chunks of the loss, where the share of a process is
    larger than one of them. `teacher_share`: of the captions, those that the teacher computes, of `teacher_tokens`;
    `engine.teacher_cache` has the others.
    """
    rows, engine = recipe.optimizer.batch // world_size, engine or recipe.engine_of(spec.name)
    micro, chunk = engine.micro_batch, engine.loss_chunk
    # The tiled loss computes the similarities again too, but half of the products for the gradients.
    return exact_breakdown(
        spec,
        teacher,
        batch=recipe.optimizer.batch,
        captions=recipe.data.captions,
        tokens=tokens,
        recompute=again and micro is not None and micro < rows,
        checkpointing=again and engine.recompute,
        chunked_loss=again and isinstance(chunk, int) and chunk < rows,
        teacher_captions=None if teacher_share == 1 else teacher_share * recipe.data.captions,
        teacher_tokens=teacher_tokens,
    ).of_steps(steps)


def _once(jobs: list[Job]) -> tuple[Job, ...]:
    """Mark each job that would train the same weights as one before it."""
    first: dict[str, str] = {}
    marked = []
    for job in jobs:
        name = first.setdefault(job.hash, job.name)
        marked.append(job if name == job.name else replace(job, same_as=name))
    return tuple(marked)


def first_student(recipe: Recipe) -> int:
    """Which link is the first that grows from another model, counted from 0; the chain may have none such."""
    return 0 if recipe.chain.from_ is not None else 1


def try_name(number: int, model: str) -> str:
    """The job of a first-pair test's try, counted from 1, that was not lossless."""
    return f"try-{number}-{model}"
