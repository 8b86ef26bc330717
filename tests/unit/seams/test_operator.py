"""A new width operator is one entry in a table: recipes, plans, `compt expand` and the reference page then know it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ConfigError
from compt.expand.axes import Kind, Use
from compt.expand.execute import expand
from compt.expand.maps import AxisMap
from compt.expand.plan import make_plan
from compt.models.clip import build
from compt.models.growth import ExpandConfig
from compt.models.operators import WIDTH_OPERATORS, WidthOperator
from compt.models.presets import PRESETS, ModelSpec
from compt.plan.jobs import make_plan as plan_jobs
from compt.plan.links import broken_promises
from compt.recipe.expansion import expand_result
from compt.recipe.reference import reference
from compt.weights.artefact import read_artefact, write_artefact
from tests.helpers.states import export_state
from tests.unit.expand.oracle import vit
from tests.unit.plan.test_links import recipe

TEACHER = vit("small", 2, 1, 2, 1, vocab_size=12)
STUDENT = replace(vit("large", 3, 1, 4, 1, vocab_size=12), embed_dim=8)


def mirrored(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """The teacher's elements in reverse order, again and again."""
    return AxisMap(old - 1 - np.arange(new, dtype=np.int64)[:, None] % old, old)


@pytest.fixture(autouse=True)
def _mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = WidthOperator("mirror", "the teacher's channels in reverse order", f"{__name__}:mirrored")
    monkeypatch.setitem(WIDTH_OPERATORS, operator.name, operator)


def reverse(old: int, new: int) -> NDArray[np.int64]:
    """The source of each of `new` positions; an axis that does not grow stays as it is."""
    return np.arange(new) if old == new else np.array([old - 1 - k % old for k in range(new)])


def dimensions(name: str, spec: ModelSpec) -> Iterator[tuple[int, ...]]:
    """Blocks, units and channels of each dimension of a parameter of a ViT's or a text tower's; units grow."""
    image = name.startswith("visual.")
    width, heads = (spec.width, spec.heads) if image else (spec.text_width, spec.text_heads)
    one = {
        "class_embedding": [width],
        "visual.positional_embedding": [5, width],
        "positional_embedding": [spec.context_length, width],
        "token_embedding.weight": [spec.vocab_size, width],
        "visual.conv1.weight": [width, 3, 4, 4],
        "in_proj_weight": [(3, heads, 4), width],
        "in_proj_bias": [(3, heads, 4)],
        "out_proj.weight": [width, (1, heads, 4)],
        "c_fc.weight": [4 * width, width],
        "c_fc.bias": [4 * width],
        "c_proj.weight": [width, 4 * width],
        "visual.proj": [width, spec.embed_dim],
        "text_projection": [width, spec.embed_dim],
        "logit_scale": [],
    }
    key = next((key for key in one if name == key or name.endswith(f".{key}")), None)
    for size in one[key] if key else [width]:  # norms and the other biases
        yield size if isinstance(size, tuple) else (1, size, 1)


def mirror(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the toy operator makes of a teacher's parameter."""
    pairs = zip(dimensions(name, TEACHER), dimensions(name, STUDENT), strict=True)
    for at, ((blocks, old, channels), (_, new, _)) in enumerate(pairs):
        before, after = values.shape[:at], values.shape[at + 1 :]
        units = values.reshape(*before, blocks, old, channels, *after)
        values = np.take(units, reverse(old, new), at + 1).reshape(*before, blocks * new * channels, *after)
    return values


def test_the_expansion_equals_plain_numpy() -> None:
    state = export_state(build(TEACHER, seed=1))
    plan = make_plan(TEACHER, STUDENT, ExpandConfig.both("mirror"))
    found = expand(plan, state, seed=2)
    assert plan.totals["copied"] == plan.totals["parameters"]
    assert "its statistics cover" in plan.inexact["text"][0]
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].numpy(), mirror(name, tensor.numpy()), name)
    grown = [name for name, tensor in state.items() if tensor.shape != found[name].shape]
    assert len(grown) == len(state) - 1


def test_compt_expand_plans_and_writes_it(tmp_path: Path) -> None:
    spec = PRESETS["vit_pico"]
    write_artefact(tmp_path / "teacher", export_state(build(spec, seed=1)), spec, {})
    sizes = ["--set", "text_width=128"]
    words = ["expand", str(tmp_path / "teacher"), "vit_pico", *sizes, "--text", "width=mirror"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"], env={"COLUMNS": "120"})
    assert shown.exception is None, shown.output
    assert "text tower: width mirror, depth duplicate" in shown.output
    assert f"{spec.text_width}→128: mirror text_res" in shown.output
    assert CliRunner().invoke(app, [*words[:3], str(tmp_path / "out"), *words[3:]]).exception is None
    made, source = read_artefact(tmp_path / "out").state, read_artefact(tmp_path / "teacher").state
    order = reverse(spec.text_width, 128)
    np.testing.assert_array_equal(made["ln_final.weight"].numpy(), source["ln_final.weight"].numpy()[order])
    embedding = source["token_embedding.weight"].numpy()[:, order]
    np.testing.assert_array_equal(made["token_embedding.weight"].numpy(), embedding)


def test_a_recipe_may_name_it() -> None:
    found = plan_jobs(recipe("vit_nano", "vit_micro", chain={"expand": {"width": "mirror"}}))
    link = found.links[1]
    assert link.expand == ExpandConfig.both("mirror")
    assert expand_result(ExpandConfig.both("mirror"))["width"] == "mirror"
    assert broken_promises(PRESETS["vit_nano"], PRESETS["vit_micro"], ExpandConfig.both("mirror")) == {}
    assert "| `mirror` | the teacher's channels in reverse order |" in reference()


def test_without_the_entry_nothing_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(WIDTH_OPERATORS, "mirror")
    with pytest.raises(ConfigError, match="unknown width operator"):
        ExpandConfig.both("mirror")
    with pytest.raises(ConfigError, match=r"chain\.expand\.width = 'mirror': unknown width operator"):
        recipe("vit_nano", "vit_micro", chain={"expand": {"width": "mirror"}})
