"""The functions behind `import compt`. Each calls what the commands call; heavy packages load when one is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from pydantic import ValidationError

from compt.errors import ConfigError
from compt.models.growth import ExpandConfig
from compt.models.presets import PRESETS, ModelSpec
from compt.plan.jobs import Plan, asked_controls, make_plan
from compt.recipe.read import find_recipe, load_recipe, parse_recipe, refuse
from compt.recipe.schema import EvalSet, Recipe
from compt.recipe.suite import name_of

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from compt.evaluate.task import Result
    from compt.models.clip import ClipModel
    from compt.models.preprocess import Preprocess
    from compt.report.summary import Summary
    from compt.weights.artefact import Artefact

RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | str | Path
SetLike: TypeAlias = EvalSet | Mapping[str, Any] | str | Path


class LoadedModel(NamedTuple):
    """A model with what its inputs need, in the order of open_clip's `create_model_and_transforms`.

    preprocess: a PIL image -> float32 [3, H, W], normalised. tokenizer: texts -> int64 [N, context_length].
    """

    model: ClipModel
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[str | list[str]], Tensor]


def list_models() -> list[str]:
    """The names of compt's models: the paper's ViTs and Swins, and small ones for CPUs.

    `create_model` and `expand_model` also accept the names of `open_clip.list_models()`.
    """
    return list(PRESETS)


def create_model(name: str, *, seed: int = 0, device: torch.device | str = "cpu", **sizes: Any) -> ClipModel:
    """A model with random weights, fp32, in training mode.

    `sizes` replace fields of the model, as in a recipe's family: `width=448`. Weights depend on `seed` and on the names
    of parameters only. Features: `model.encode_image` float32 [N, 3, H, W] -> [N, embed_dim], `model.encode_text`
    int64 [N, context_length] -> [N, embed_dim]; neither has unit length. Raises ConfigError for an unknown name or
    impossible sizes.
    """
    from compt.models.clip import build
    from compt.models.presets import resized
    from compt.weights.infer import model_spec, sizes_for

    spec = model_spec(name)
    return build(resized(spec, sizes_for(spec, sizes)), device, seed)


def load_model(
    path: str | Path, *, name: str | None = None, prefix: str | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """A trained model, fp32 and in evaluation mode, with its preprocessing and tokenizer.

    `path`: a model folder of compt or a link's folder (`runs/demo/jobs/3-vit_mini`), a folder or file of open_clip,
    Hugging Face (CLIP), torch.distributed.checkpoint or DeepSpeed, or ARCH:TAG of open_clip. `name`: the architecture,
    if its files do not say. `prefix`: which of several models in it. Raises ArtefactError or ConfigError.
    """
    from functools import partial

    from open_clip.transform import PreprocessCfg, image_transform_v2

    from compt.data.tokens import clip_tokenizer

    found = _open(path, name, prefix)
    model = found.load_model(device).eval()
    _remember(model, found.preprocess)
    config = PreprocessCfg(**found.preprocess.to_dict(found.spec.image_size))
    tokenizer = partial(clip_tokenizer(), context_length=found.spec.context_length)
    return LoadedModel(model, image_transform_v2(config, is_train=False), tokenizer)


def expand_model(
    teacher: ClipModel | LoadedModel | str | Path,
    student: str,
    *,
    operator: str = "insert",
    depth: str = "duplicate",
    seed: int = 0,
    config: ExpandConfig | None = None,
    device: torch.device | str = "cpu",
    **sizes: Any,
) -> ClipModel:
    """Inverse weight initialization: the larger model `student` with the weights of a smaller `teacher`, fp32.

    `teacher`: a model of `create_model`, `load_model` or this function, or what `load_model` opens. `student` and
    `sizes`: as in `create_model`; what must agree, such as the activation, is the teacher's. `operator` widens, `depth`
    adds layers, in both towers (docs/expansion.md); `config` sets everything instead. New weights are those of
    `create_model(student, seed=seed)`. Raises ConfigError for a student that is smaller than the teacher.
    """
    from compt.expand.execute import expand
    from compt.expand.plan import make_plan as plan_expansion
    from compt.models.clip import ClipModel, build, fill
    from compt.weights.infer import student_of
    from compt.weights.open import average_of

    if isinstance(teacher, LoadedModel):
        teacher = teacher.model
    found = None if isinstance(teacher, ClipModel) else _open(teacher)
    if found is not None:
        spec, state = found.spec, found.state
    else:
        assert isinstance(teacher, ClipModel)
        spec, state = teacher.spec, teacher.state_dict()
    plan = plan_expansion(spec, student_of(spec, student, sizes)[0], config or ExpandConfig.both(operator, depth))
    average = average_of(found) if found is not None and plan.needs_average else None
    model = fill(build(plan.student, device="meta"), expand(plan, state, seed, average), device)
    _remember(model, found.preprocess if found is not None else _preprocess_of(teacher))
    return model


def plan_chain(
    recipe: RecipeLike, *, overrides: Sequence[str] = (), baselines: bool = False, controls: bool = False
) -> Plan:
    """The models that a recipe trains, in their order, with steps and MACs. Needs no data and no GPU.

    `recipe`: a Recipe, its values, a YAML file, or the name of a shipped recipe. `overrides`: KEY=VALUE, as `--set` of
    the command line, for a file or a name. `plan.links` has the jobs of the chain: `job.name`, `job.steps`,
    `job.epochs` and `job.cost.total_macs` (multiply-accumulates of training, with the teacher's forward passes).
    Raises ConfigError for a recipe with mistakes, which it names.
    """
    found = _recipe(recipe, overrides)
    return make_plan(found, baselines=baselines, controls=asked_controls(found, baselines, controls, found.name))


class Chain:
    """A chain of models to train, as `compt chain` does. The arguments are those of `plan_chain`."""

    def __init__(
        self, recipe: RecipeLike, *, overrides: Sequence[str] = (), baselines: bool = False, controls: bool = False
    ) -> None:
        self.recipe = _recipe(recipe, overrides)
        self.baselines = baselines
        self.controls = asked_controls(self.recipe, baselines, controls, self.recipe.name)

    def run(self, folder: str | Path, *, say: Callable[[str], None] = lambda line: None) -> Summary:
        """Train what `folder` does not have yet, on this process or on all ranks of a launcher, and return the results.

        `summary.rows` has a row for each model: `job`, `epochs`, `macs`, `device_hours`, and `top1` in percent with
        `low` and `high`, its 95 % interval (None without `evaluation.primary`); `row.scores` has everything by set.
        `summary.comparisons` and `summary.control_comparisons` compare links with models trained from scratch.
        The models are in `folder/jobs/NAME/model`. `say` gets lines of progress. Paths of the recipe start at the
        current folder. Raises ConfigError, DataError, RunError, and Interrupted on SIGTERM or Ctrl-C: finished work
        stays, and the same call continues. In another thread than the main one it hears no signals, and they do what
        they did before. A process group of the caller's stays; on GPUs it needs the backend "cpu:gloo,cuda:nccl".
        """
        import torch.distributed

        from compt.chain.run import prepare, run_chain, waiting
        from compt.dist import collectives as dist
        from compt.report.summary import summarise
        from compt.train.signals import StopSignal

        place = Path(folder)
        wanted: dict[str, Any] = {"baselines": self.baselines, "controls": self.controls, "source": self.recipe.name}
        joined = torch.distributed.is_initialized()
        try:
            with StopSignal(at_once=True):
                context, plan = prepare(self.recipe, place, base=Path.cwd(), **wanted)
                if waiting(plan, place):
                    run_chain(context, plan, say)
                return summarise(place)
        finally:
            if not joined:  # a process group of the caller stays
                dist.shutdown()


def evaluate_model(
    model: nn.Module | LoadedModel | str | Path,
    sets: SetLike | Sequence[SetLike],
    *,
    preprocess: Preprocess | None = None,
    batch: int = 256,
    workers: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Result]:
    """Score a model on evaluation sets; the results by the names of the sets.

    `model`: a model of compt or of open_clip on its device, or what `load_model` opens. A set is a path of shards or of
    a folder of class folders, to score zero-shot, or the fields of a recipe's `evaluation.sets`: `{"name": "pairs",
    "task": "retrieval", "data": "data/pairs/*.tar"}`. Paths start at the current folder. `preprocess`: the model's own
    unless given. `device`: for a model that is opened (default: the CPU). `result.headline()` has the scores by name,
    in percent (`top1`, `top5`); `result.to_dict()` has `top1_interval` too, the 95 % interval. Raises ConfigError for
    `device` beside a module or a mistake in a set, and DataError for data that cannot be used.
    """
    from compt.evaluate.sets import evaluate_set
    from compt.evaluate.task import EvalSettings

    if isinstance(model, LoadedModel):
        model = model.model
    if isinstance(model, str | Path):
        scored: nn.Module = load_model(model, device=device or "cpu").model
    elif device is None:
        scored = model
    else:
        raise ConfigError("evaluate_model: `device` is for a model that is opened; move a module with .to()")
    settings = EvalSettings(preprocess or _preprocess_of(scored), Path.cwd(), batch, workers)
    several = [sets] if isinstance(sets, str | Path | EvalSet | Mapping) else sets
    found = [_evaluation_set(item) for item in several]
    names = [item.name for item in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"evaluate_model: two sets have the name '{twice[0]}'")
    return {item.name: evaluate_set(scored, item, settings) for item in found}


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    image_to_text: Literal["slot", "all"] = "slot",
    gather: bool = True,
) -> Tensor:
    """The symmetric contrastive loss that compt trains with (CoM-PT, section 3.2), a scalar.

    `image` float [B, D]; `text` float [B, D], or [B, M, D] with M captions per image; normalised here. `logit_scale`:
    one number, already exponentiated, as open_clip's ClipLoss takes it. With one caption it is open_clip's loss.
    `image_to_text`: with several captions, whether candidates are those of one slot or all. With `gather` in a process
    group the negatives are those of all ranks, and the mean over ranks is the loss. Raises ValueError for shapes that
    do not match, and for another `image_to_text`.
    """
    import torch

    from compt.train.losses import contrastive_loss as loss

    captions = text[:, None] if text.ndim == 2 else text
    # A scalar in fp64 is exact, and does not make the products with fp32 features wider.
    scale = logit_scale if isinstance(logit_scale, torch.Tensor) else torch.tensor(logit_scale, dtype=torch.float64)
    return loss(image, captions, scale, image_to_text=image_to_text, gather=gather).task


def feature_distillation(student: Tensor, teacher: Tensor, *, alpha: float = 500.0) -> Tensor:
    """Inverse feature distillation of one tower (CoM-PT, section 3.2), a scalar; compt adds the mean of both towers.

    `student`, `teacher`: float features of the same shape [..., D], the student's already projected to the teacher's
    width; normalised here. No gradient reaches the teacher. The value is alpha * D/512 * mean of the squared
    differences: `alpha` means the same at every width. Raises ValueError for shapes that differ.
    """
    from compt.train.losses import feature_distance

    if student.shape != teacher.shape:
        raise ValueError(
            f"expected features of one shape, got student {[*student.shape]} and teacher {[*teacher.shape]}"
        )
    return feature_distance(teacher, student, alpha)


def _recipe(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, str | Path):
        return load_recipe(find_recipe(recipe), overrides)
    if overrides:
        raise ConfigError("overrides: change a recipe of a file or of a name; change the values themselves instead")
    return recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)


def _open(path: str | Path, name: str | None = None, prefix: str | None = None) -> Artefact:
    from compt.weights.infer import model_spec
    from compt.weights.open import open_model

    inside = Path(path) / "model"
    spec: ModelSpec | None = model_spec(name) if name else None
    return open_model(inside if inside.is_dir() else path, spec, prefix)


def _remember(model: ClipModel, preprocess: Preprocess) -> None:
    """Leave the preprocessing with the model, where open_clip leaves it too."""
    from open_clip.model import set_model_preprocess_cfg

    set_model_preprocess_cfg(model, preprocess.to_dict(model.spec.image_size))


def _preprocess_of(model: Any) -> Preprocess:
    from compt.models.preprocess import Preprocess

    return Preprocess.of(getattr(getattr(model, "visual", model), "preprocess_cfg", {}), "model.visual.preprocess_cfg")


def _evaluation_set(item: SetLike) -> EvalSet:
    if isinstance(item, EvalSet):
        return item
    values = {"name": name_of(str(item)), "data": [str(item)]} if isinstance(item, str | Path) else item
    try:
        return EvalSet.model_validate(values)
    except ValidationError as error:
        raise refuse("evaluate_model", error, EvalSet) from None
