"""What a chain may come to, against a plan of each draw; and epochs that are enough with a given probability."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compt.cost.gpus import find_device
from compt.cost.paper import IMAGES
from compt.design.candidates import candidates
from compt.design.confidence import known_epochs, log_fraction
from compt.design.costs import macs_costs
from compt.design.epochs import Bound, EpochModel, LinkEpochs, log2_size, paper_matches
from compt.design.outcome import Setting, designed_recipe, outcome
from compt.design.search import found, problem
from compt.models.presets import PRESETS
from compt.plan.forecast import Machine, make_forecast
from compt.recipe.read import load_recipe

ROOT = Path(__file__).resolve().parents[3]
CC3M = IMAGES["cc3m"]
MODEL = EpochModel.fit(paper_matches())
LOW, HIGH = 0.1, 0.9


@pytest.mark.parametrize("epochs", [(128.0, 24.0, 18.0, 15.0), (128.0, 40.0, 18.0, 12.0), (128.0, 60.0, 60.0, 60.0)])
@pytest.mark.parametrize("distilled", [True, False])
def test_ranges_are_those_of_the_draws(epochs: tuple[float, ...], distilled: bool) -> None:
    """Each draw of needed epochs is costed by itself, from the plan of a recipe with links of one epoch."""
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

    draws = MODEL.draws(setting.links(specs)).tolist()
    totals, least, middle, most, enough = [], [], [], [], []
    for draw in draws:
        spent = [epochs[0]] + [max(pair) for pair in zip(epochs[1:], draw, strict=True)]
        enough.append([need <= have for need, have in zip(draw, epochs[1:], strict=True)])
        totals.append(sum(e * cost for e, cost in zip(spent, macs, strict=True)))
        for sums, at in ((least, 0), (middle, 1), (most, 2)):
            sums.append(sum(e * time[at] for e, time in zip(spent, times, strict=True)))

    planned = sum(e * cost for e, cost in zip(epochs, macs, strict=True))
    hours = sum(e * time[1] for e, time in zip(epochs, times, strict=True))
    assert shown.gpu_hours is not None
    assert shown.gpu_hours_acceleration is not None
    found = shown.gpu_hours.hours
    close = {"rel": 1e-3}
    assert shown.macs.middle == pytest.approx(planned, **close)
    assert shown.macs.low == shown.macs.middle
    assert shown.macs.high == pytest.approx(max(planned, np.quantile(totals, HIGH)), **close)
    assert shown.acceleration.middle == pytest.approx(alone / planned, **close)
    assert shown.acceleration.high == shown.acceleration.middle
    assert shown.acceleration.low == pytest.approx(min(alone / planned, alone / np.quantile(totals, HIGH)), **close)
    assert (found.low, found.middle, found.high) == pytest.approx(
        (np.quantile(least, LOW), hours, np.quantile(most, HIGH)), **close
    )
    assert found.low < np.quantile(middle, LOW) <= np.quantile(middle, HIGH) < found.high
    assert shown.gpu_hours_acceleration.low == pytest.approx(alone_hours / np.quantile(middle, HIGH), **close)
    assert shown.long_enough == pytest.approx(np.mean(enough, axis=0))
    assert shown.all_long_enough == pytest.approx(np.mean([all(row) for row in enough]))


def test_the_probability_belongs_to_the_epochs() -> None:
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml")
    setting = Setting(recipe, MODEL, 128.0)
    specs = list(recipe.family.specs().values())
    shares = [outcome(setting, "", specs, [128.0, *[e] * 3]).all_long_enough for e in (5.0, 20.0, 40.0, 128.0)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert outcome(setting, "", specs[:1], [128.0]).all_long_enough == 1
    assert outcome(setting, "", specs, [128.0] * 4).gpu_hours is None


SMALL = replace(PRESETS["vit_t16"], depth=6, text_depth=6)


@pytest.mark.parametrize("images", [CC3M // 2, CC3M, 2 * IMAGES["merged15m"]])
def test_a_quantile_is_that_of_the_draws(images: int) -> None:
    """Also where the start prior or the growth beyond the points adds to the spread; all pairs at once."""
    pairs = [("vit_s16", PRESETS["vit_t16"], 1), ("vit_l16", PRESETS["vit_b16"], 3), ("vit_t16", SMALL, 2)]
    students = np.array([log2_size(PRESETS[student]) for student, _, _ in pairs])
    teachers = np.array([log2_size(teacher) for _, teacher, _ in pairs])
    positions = np.array([position for _, _, position in pairs])
    links = [LinkEpochs(PRESETS[student], teacher, position, images, 1e9) for student, teacher, position in pairs]
    draws = MODEL.draws(links, count=40_000, seed=7) / 1e9
    for confidence in (0.2, 0.4, 0.6, 0.8, 0.95):
        fraction = np.exp(log_fraction(MODEL, students, teachers, positions, images, True, confidence))
        shares = (draws <= np.minimum(1, fraction)).mean(axis=0)
        assert shares[fraction < 1] == pytest.approx(confidence, abs=0.015)
        assert (fraction < 1).any()
    middle = log_fraction(MODEL, students, teachers, positions, images, True)
    assert middle == pytest.approx(MODEL.log_fraction(students, teachers, positions, images, True))


def test_the_search_plans_with_that_confidence() -> None:
    names = ("vit_t16", "vit_s16", "vit_b16")
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml")
    models = candidates({name: PRESETS[name] for name in names})
    pair = LinkEpochs(PRESETS["vit_s16"], PRESETS["vit_t16"], 1, CC3M, 128.0)
    model = EpochModel.fit(paper_matches(), bounds=[Bound(pair, "here", more_than=30.0)])
    costs = macs_costs(recipe, models.specs)
    task = problem(models, costs, model, images=CC3M, baseline_epochs=128.0, confidence=0.9)
    setting = Setting(recipe, model, 128.0)
    chain = found(task, models.wanted)
    shown = outcome(setting, "", [PRESETS[name] for name in names], chain.epochs)
    assert all(0.89 <= share <= 0.95 for share in shown.long_enough), shown.long_enough
    assert chain.epochs[1] == np.ceil(2 * known_epochs(model, pair, 0.9)) / 2 > 30


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
