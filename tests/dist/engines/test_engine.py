"""The data-parallel engine and accumulation: every way of splitting a batch gives one process's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.engines.base import AdamWSettings, Precision, decays
from compt.engines.compiler import CACHE, compile_model
from compt.engines.ddp import DataParallelEngine
from compt.errors import ArtefactError
from compt.models.clip import ClipModel, build
from compt.models.presets import PACKED, resolve
from compt.recipe.engine import Compile, CompileMode
from compt.train.accumulate import cached_backward
from compt.train.losses import ContrastiveLoss, ImageToText
from compt.train.task import ClipTask, DistillTask
from tests.dist.spawn import run_ranks
from tests.unit.train.test_losses import oracle
from tests.unit.train.test_task import batch, model

TEACHERS = [None, 16, 24]
"""No distillation, a teacher of the student's width, one that needs projectors."""


def make_task(teacher: int | None, dtype: torch.dtype, **settings: Any) -> ClipTask:
    student = model().to(dtype)
    if teacher is None:
        return ClipTask(student, **settings)
    task = DistillTask(student, model(teacher, seed=1), teacher_dtype=dtype, **settings)
    task.module.to(dtype)
    return task


def own_rows(dtype: torch.dtype, samples: int = 8) -> tuple[Tensor, Tensor]:
    images, tokens = batch(samples)
    share = samples // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    return images[own].to(dtype), tokens[own]


def run(
    teacher: int | None, dtype: torch.dtype, micro: int | None, precision: Precision = "fp32", **settings: Any
) -> dict[str, Any]:
    """Loss and gradient norm over all ranks, and this rank's gradients."""
    task = make_task(teacher, dtype, **settings)
    engine = DataParallelEngine(task.module, precision=precision)
    if engine._scale is not None:
        engine._scale.scale.fill_(256.0)
    loss, report = cached_backward(task, engine, *own_rows(dtype), micro)
    # In their own dtype: `gradients` gives fp32.
    scale = 1.0 if engine._scale is None else engine._scale.scale.item()
    gradients = {name: cast(Tensor, p.grad) / scale for name, p in task.module.named_parameters()}
    given = dict(engine.gradients())
    assert all(torch.equal(given[name], gradient.float()) for name, gradient in gradients.items())
    return {
        "loss": dist.all_reduce_sum(loss.item()) / dist.world_size(),
        "norm": engine.step(0.0).item(),
        "gradients": gradients,
        "report": set(report),
    }


def copies(engine: DataParallelEngine) -> dict[str, Tensor]:
    """The engine's state as it is now."""
    return {name: tensor.detach().clone() for name, tensor in engine.state().items()}


def reference(teacher: int | None, image_to_text: ImageToText = "slot") -> tuple[float, dict[str, Tensor]]:
    """The whole batch in double precision, the losses as loops, the projectors as matrix products."""
    images, tokens = batch()
    images = images.double()
    task = make_task(teacher, torch.float64)
    student = task.model
    image = student.encode_image(images)
    text = torch.stack([student.encode_text(tokens[:, slot]) for slot in range(2)], dim=1)
    loss, _, _ = oracle(image, text, student.logit_scale.exp(), image_to_text)
    parameters = dict(task.module.named_parameters())
    if isinstance(task, DistillTask):
        with torch.no_grad():
            goals = {
                "image": task.teacher.encode_image(images),
                "text": torch.stack([task.teacher.encode_text(tokens[:, slot]) for slot in range(2)], dim=1),
            }
        for tower, feature in (("image", image), ("text", text)):
            if teacher != 16:
                weight, bias = (parameters[f"projector.{tower}.{part}"] for part in ("weight", "bias"))
                feature = feature @ weight.T + bias
            goal = goals[tower]
            difference = functional.normalize(feature, dim=-1) - functional.normalize(goal, dim=-1)
            width = goal.shape[-1]
            loss = loss + 0.5 * 500.0 * (width / 512) * (difference**2).sum() / goal.numel()
    loss.sum().backward()
    return loss.item(), {name: cast(Tensor, parameter.grad) for name, parameter in parameters.items()}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Tensor by tensor, relative to its norm. Key biases absolutely: their gradient is rounding noise."""
    assert found.keys() == expected.keys()
    for name, correct in expected.items():
        error = found[name].double() - correct.double()
        if name.endswith("attn.in_proj_bias"):
            third = len(correct) // 3
            assert error[third : 2 * third].norm() < tolerance, name
            error = torch.cat((error[:third], error[2 * third :]))
        assert error.norm() <= tolerance * correct.norm(), name


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("world", [1, 2])
def test_gradients_equal_the_loops(teacher: int | None, world: int) -> None:
    loss, gradients = reference(teacher)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        results = [run(teacher, dtype, None)] if world == 1 else run_ranks(run, world, teacher, dtype, None)
        for found in results:
            assert found["loss"] == pytest.approx(loss, rel=tolerance)
            assert found["norm"] == pytest.approx(norm, rel=tolerance)
            assert_gradients(found["gradients"], gradients, tolerance)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_accumulation_equals_one_large_batch(teacher: int | None, world: int, micro: int) -> None:
    loss, gradients = reference(teacher)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        results = [run(teacher, dtype, micro)] if world == 1 else run_ranks(run, world, teacher, dtype, micro)
        for found in results:
            assert found["loss"] == pytest.approx(loss, rel=tolerance)
            assert_gradients(found["gradients"], gradients, tolerance)
            assert ("r" in found["report"]) == (teacher is not None)


def test_accumulation_with_chunks_buckets_and_all_captions() -> None:
    loss, gradients = reference(24, "all")
    task = make_task(24, torch.float64, loss=ContrastiveLoss("all", chunk=3), text_buckets=2)
    engine = DataParallelEngine(task.module)
    images, tokens = own_rows(torch.float64)
    found, _ = cached_backward(task, engine, images, tokens, 5, tokens.argmax(dim=-1) + 1)
    assert found.item() == pytest.approx(loss, rel=1e-10)
    assert_gradients({n: cast(Tensor, p.grad) for n, p in task.module.named_parameters()}, gradients, 1e-10)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_accumulation_in_mixed_precision(precision: Precision) -> None:
    """Pieces differ from the whole by rounding only, and fp16's scale is taken off once."""
    whole = run(24, torch.float32, None, precision)
    pieces = run(24, torch.float32, 3, precision)
    exact = run(24, torch.float32, None)
    assert pieces["loss"] == pytest.approx(whole["loss"], rel=1e-2)
    assert pieces["norm"] == pytest.approx(whole["norm"], rel=5e-2)
    assert whole["norm"] == pytest.approx(exact["norm"], rel=0.1)


def trajectory(world_micro: int | None) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps with a large eps, so that noise in zero gradients moves no weights."""
    task = make_task(24, torch.float32)
    engine = DataParallelEngine(task.module, AdamWSettings(eps=1e-4))
    norms = []
    for step in range(3):
        cached_backward(task, engine, *own_rows(torch.float32), world_micro)
        norms.append(engine.step(1e-3 * (step + 1), 1.0).item())
    return norms, copies(engine)


def test_steps_on_two_ranks_equal_one_process() -> None:
    norms, state = trajectory(None)
    (first, first_state), (second, second_state) = run_ranks(trajectory, 2, 3)
    assert first == second
    assert first == pytest.approx(norms, rel=1e-5)
    assert norms[0] != norms[2]
    for name, value in state.items():
        assert torch.equal(first_state[name], second_state[name]), name
        torch.testing.assert_close(first_state[name], value, rtol=1e-4, atol=2e-6)


def two_pieces() -> list[float]:
    """The gradient after each of two backwards, the first without averaging; this rank's inputs are rank + 1."""
    module = nn.Linear(1, 1, bias=False)
    engine = DataParallelEngine(module)
    found = []
    for last in (False, True):
        output = cast(Tensor, engine.forward(torch.full((1, 1), dist.rank() + 1.0), last=last))
        engine.backward(output.sum(), last=last)
        found.append(cast(Tensor, module.weight.grad).item())
    return found


def test_only_the_last_backward_talks_to_other_ranks() -> None:
    assert run_ranks(two_pieces, 2) == [[1.0, 3.0], [2.0, 3.0]]


def nonfinite() -> tuple[float, bool, bool]:
    task = make_task(None, torch.float32)
    engine = DataParallelEngine(task.module, ema_decay=0.9)
    images, tokens = own_rows(torch.float32)
    cached_backward(task, engine, images, tokens)
    engine.step(1e-3, 1.0)
    before = copies(engine)
    if dist.rank() == 0:
        images[0, 0, 0, 0] = float("nan")
    cached_backward(task, engine, images, tokens)
    norm = engine.step(1e-3, 1.0)
    untouched = all(torch.equal(value, before[name]) for name, value in engine.state().items())
    cached_backward(task, engine, *own_rows(torch.float32))
    engine.step(1e-3, 1.0)
    moved = all(not torch.equal(v, before[n]) for n, v in engine.state().items() if n.endswith(".step"))
    return norm.item(), untouched, moved


@pytest.mark.parametrize("world", [1, 2])
def test_a_nonfinite_gradient_skips_the_step_on_all_ranks(world: int) -> None:
    for norm, untouched, moved in [nonfinite()] if world == 1 else run_ranks(nonfinite, world):
        assert norm != norm
        assert untouched
        assert moved


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    engine = DataParallelEngine(module, precision="fp16")
    before = copies(engine)
    engine.backward(module(torch.full((2, 4), 1e35)).sum())
    assert not engine.step(1.0).isfinite()
    after = copies(engine)
    assert torch.equal(before["model.weight"], after["model.weight"])
    assert after["scaler.scale"] == before["scaler.scale"] / 2
    engine.save(tmp_path)()
    other = DataParallelEngine(nn.Linear(4, 4), precision="fp16")
    other.load(tmp_path)
    assert other.state()["scaler.scale"] == after["scaler.scale"]


def test_weight_decay_follows_open_clip() -> None:
    for name in ("vit_pico", "swin_t"):
        parameters = dict(build(resolve(name), device="meta").named_parameters())
        for key, parameter in parameters.items():
            excluded = parameter.ndim < 2 or any(part in key for part in ("bn", "ln", "bias", "logit_scale"))
            assert decays(key, parameter) is not excluded, key
    assert decays("visual.positional_embedding", torch.ones(4, 4))
    assert not decays("visual.class_embedding", torch.ones(4))
    engine = DataParallelEngine(model(), AdamWSettings(weight_decay=0.2))
    decayed, free = engine.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    assert any(parameter is engine.unwrapped.get_parameter("logit_scale") for parameter in free["params"])


def test_state_goes_round_bitwise_and_training_goes_on_equally(tmp_path: Path) -> None:
    task = make_task(24, torch.float32)
    engine = DataParallelEngine(task.module, AdamWSettings(weight_decay=0.3), ema_decay=0.9)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    engine.save(tmp_path / "empty")()
    images, tokens = own_rows(torch.float32)

    def advance(task: ClipTask, engine: DataParallelEngine) -> None:
        cached_backward(task, engine, images, tokens)
        engine.step(1e-2)

    advance(task, engine)
    kept = copies(engine)
    weight = "projector.image.weight"
    assert {"model.model.logit_scale", f"model.{weight}", f"optim.{weight}.exp_avg", f"ema.{weight}"} <= set(kept)
    assert not any("teacher" in name for name in kept)
    engine.save(tmp_path / "one")()

    other = make_task(24, torch.float32, seed=9)
    fresh = DataParallelEngine(other.module, AdamWSettings(weight_decay=0.3), ema_decay=0.9)
    fresh.load(tmp_path / "one")
    assert all(torch.equal(value, kept[name]) for name, value in fresh.state().items())
    advance(task, engine)
    advance(other, fresh)
    ours, theirs = engine.state(), fresh.state()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not torch.equal(ours[f"model.{weight}"], kept[f"model.{weight}"])

    engine.load(tmp_path / "empty")
    assert engine.state()["optim.model.logit_scale.step"] == 0


def test_a_foreign_state_is_refused_key_by_key_and_changes_nothing(tmp_path: Path) -> None:
    DataParallelEngine(nn.Linear(2, 3, bias=False)).save(tmp_path)()
    engine = DataParallelEngine(nn.Linear(2, 2))
    before = copies(engine)
    with pytest.raises(ArtefactError) as error:
        engine.load(tmp_path)
    for part in ("bias is missing", "weight has shape [3, 2] instead of [2, 2]"):
        assert f"model.{part}" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in engine.state().items())


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    """AdamW's first moment after one step is a tenth of the gradient that it saw."""
    for most, seen in ((None, 20.0), (1.0, 1.0)):
        module = nn.Linear(3, 1)
        engine = DataParallelEngine(module, AdamWSettings(betas=(0.9, 0.98)))
        engine.backward(10 * module(torch.ones(1, 3)).sum())
        assert engine.step(0.0, most).item() == pytest.approx(20.0)
        moments = [value for name, value in engine.state().items() if name.endswith("exp_avg")]
        assert torch.cat([moment.flatten() for moment in moments]).norm().item() == pytest.approx(seen / 10, rel=1e-4)
        assert module.weight.grad is None


def test_values_are_capped_after_the_step() -> None:
    task = make_task(None, torch.float32)
    engine = DataParallelEngine(task.module, caps={"model.logit_scale": 2.0})
    cached_backward(task, engine, *own_rows(torch.float32))
    engine.step(1e-3)
    assert task.model.logit_scale.item() == 2.0
    assert task.caps == {"model.logit_scale": pytest.approx(4.60517)}


def test_values_come_from_outside_one_by_one_and_nothing_else() -> None:
    source = make_task(24, torch.float32)
    with torch.device("meta"):
        empty = ClipModel(source.model.spec)
    task = ClipTask(empty, projected=24, seed=0)
    model = {**source.model.state_dict(), "logit_scale": source.model.logit_scale.detach().reshape(())}
    engine = DataParallelEngine(task.module, initial=task.module.initial(model))
    expected = dict(source.module.state_dict())
    found = dict(engine.weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(task.model.attn_mask, source.model.attn_mask)
    with torch.device("meta"):
        other = ClipTask(ClipModel(source.model.spec))
    with pytest.raises(ArtefactError, match="model.ln_final.bias is missing"):
        DataParallelEngine(
            other.module,
            initial=other.module.initial({k: v for k, v in model.items() if k != "ln_final.bias"}),
        )


def test_compiling_leaves_names_alone() -> None:
    plain, compiled = DataParallelEngine(model()), DataParallelEngine(model(), compile="towers")
    assert list(plain.state()) == list(compiled.state())


def test_recomputing_gives_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        task = make_task(24, torch.float32)
        engine = DataParallelEngine(task.module, recompute=recompute)
        cached_backward(task, engine, *own_rows(torch.float32), 3)
        found.append(dict(engine.gradients()))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "buckets"), [("blocks", PACKED), ("towers", 2)])
def test_compiled_models_give_the_same_gradients_at_any_length_and_compile_once(
    how: Compile, buckets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, "")
    images, tokens = own_rows(torch.float32)
    counters = torch._dynamo.utils.counters
    results, hits, misses = [], [], []
    compiled: tuple[Compile, ...] = ("off", how, how)  # the last one as in a resumed run
    for way in compiled:
        torch._dynamo.reset()
        counters.clear()
        task = make_task(24, torch.float32, text_buckets=buckets)
        engine = DataParallelEngine(task.module, compile=way)
        found = []
        for cut in (10, 9, 8, 7):
            shorter = tokens.masked_fill(torch.arange(10) >= cut, 0)
            shorter[..., cut - 1] = 63
            loss, _ = cached_backward(task, engine, images, shorter, 4)
            found.append(loss.item())
            if cut == 8:
                graphs = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs, "compiled again for another length"
        assert (graphs > 0) == (way != "off")
        results.append([*found, engine.step(0.0).item()])
        hits.append(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
        misses.append(counters["inductor"]["fxgraph_cache_miss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-6)
    assert misses[1] > 0 == misses[2], "a resumed run compiles again"
    assert hits[2] >= misses[1] / 2
    assert (tmp_path / "compt" / "compiled").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"])
def test_modes_that_capture_graphs_have_fixed_sizes_of_packed_text(
    mode: CompileMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed: dict[str, bool | None] = {}

    def compiled(tower: Any, dynamic: bool | None = None, **options: Any) -> Any:
        fixed[tower.__name__] = dynamic
        skips = options.get("options", {}).get("triton.cudagraph_skip_dynamic_graphs", False)
        assert skips == options.get("options", {}).get("triton.cudagraphs", False)
        return tower

    monkeypatch.setenv(CACHE, "/somewhere")
    monkeypatch.setattr(torch, "compile", compiled)
    student = model()
    compile_model(student, "towers", mode, torch.device("cuda"))
    captures = mode in ("reduce-overhead", "max-autotune")
    assert (student.text_sizes is not None) == captures
    assert fixed == {"_image_tower": None, "_text_tower": None, "_packed_tower": False if captures else None}
