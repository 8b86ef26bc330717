"""The cost of a chain, against plans of recipes with one epoch a link."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compt.cost.gpus import find_device
from compt.design.candidates import candidates
from compt.design.epochs import EpochModel, Range, paper_matches
from compt.design.outcome import Setting, designed_recipe, outcome
from compt.models.presets import PRESETS
from compt.plan.forecast import Machine, make_forecast
from compt.recipe.read import load_recipe

ROOT = Path(__file__).resolve().parents[3]
MODEL = EpochModel.fit(paper_matches())


@pytest.mark.parametrize("epochs", [(128.0, 24.0, 18.0, 15.0), (128.0, 40.0, 18.0, 12.0), (128.0, 60.0, 60.0, 60.0)])
@pytest.mark.parametrize("distilled", [True, False])
def test_costs_and_ranges_of_a_chain(epochs: tuple[float, ...], distilled: bool) -> None:
    """From the plan of a recipe with short links: the expensive end has links as long as the upper ends."""
    alpha = [] if distilled else ["chain.distill.alpha=0"]
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml", alpha)
    device = find_device("a100-80")
    setting = Setting(recipe, MODEL, 128.0, device, gpus=8)
    specs = list(recipe.family.specs().values())
    shown = outcome(setting, "x", specs, epochs)

    each = [
        word for at in range(4) for word in (f"chain.links.{at}.train.epochs=4", f"chain.links.{at}.warmup.steps=1")
    ]
    short = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml", [*alpha, *each])
    forecast = make_forecast(short, Machine(device, 8))
    macs, times = [], []
    for item in forecast.links:
        assert item.hours is not None
        macs.append(item.job.cost.total_macs / item.job.epochs)
        times.append([hours / item.job.epochs for hours in (item.hours.low, item.hours.gpu_hours, item.hours.high)])
    alone = sum(item.job.cost.total_macs for item in forecast.individual)
    alone_hours = sum(item.hours.gpu_hours for item in forecast.individual if item.hours)

    upper = [128.0, *(MODEL.predict(link).high for link in setting.links(specs))]
    longest = [max(pair) for pair in zip(epochs, upper, strict=True)]
    planned, most = (sum(e * cost for e, cost in zip(some, macs, strict=True)) for some in (epochs, longest))
    least, middle, _ = (sum(e * time[at] for e, time in zip(epochs, times, strict=True)) for at in range(3))
    _, longer, dearest = (sum(e * time[at] for e, time in zip(longest, times, strict=True)) for at in range(3))
    assert shown.gpu_hours is not None
    assert shown.gpu_hours_acceleration is not None

    def close(found: Range, *expected: float) -> None:
        assert (found.middle, found.low, found.high) == pytest.approx(expected, rel=1e-3)

    close(shown.macs, planned, planned, most)
    close(shown.acceleration, alone / planned, alone / most, alone / planned)
    close(shown.gpu_hours.hours, middle, least, dearest)
    close(shown.gpu_hours_acceleration, alone_hours / middle, alone_hours / longer, alone_hours / middle)
    assert (most == planned) == (min(epochs[1:]) == 60.0 and distilled)


def test_positions_count_the_models_that_fit() -> None:
    specs = [PRESETS[f"vit_{size}16"] for size in ("t", "c", "s", "m", "b")]
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml")
    merged = load_recipe(ROOT / "recipes" / "merged15m_vit.yaml")
    positions = [[link.position for link in Setting(one, MODEL, 64.0).links(specs)] for one in (recipe, merged)]
    assert positions == [[1, 2, 3, 4], [1, 1, 1, 2]]
    assert outcome(Setting(recipe, MODEL, 64.0), "", specs[:1], [64.0]).gpu_hours is None


def test_a_designed_chain_of_swins_in_another_resolution_comes_out_as_a_recipe() -> None:
    changes = [
        "family.members=[{name: wide, preset: swin_l384, width: 256, depths: [2, 2, 20, 2]}]",
        "chain.links=[{model: wide, train: {epochs: 24}, warmup: {steps: 10}}]",
    ]
    recipe = load_recipe(ROOT / "recipes" / "cc3m_swin.yaml", changes)
    chain = candidates(recipe.family.specs()).specs
    made = designed_recipe(recipe, chain, [128.0, 20.0, 20.0, 20.0, 20.0], "here")
    first, *_, wide = made["family"]["members"]
    assert {key: first[key] for key in first if "text" not in key} == {
        "name": "swin_t",
        "image_size": 384,
        "window": 12,
    }
    assert wide == {"name": "wide", "preset": "swin_l384", "width": 256, "depths": [2, 2, 20, 2]}
    odd = candidates({"odd": replace(chain[-1], name="odd", timm_name="")}).specs
    assert designed_recipe(recipe, odd, [128.0] * 5, "here")["family"]["members"][-1] == {
        "name": "odd",
        "preset": "swin_l",
        "width": 256,
        "depths": [2, 2, 20, 2],
        "image_size": 384,
        "window": 12,
    }
