"""Every recipe in the repository is read and planned, quickly and without torch; the paper's give its figures."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compt.plan.jobs import Plan, make_plan
from compt.recipe.read import load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# CoM-PT (arXiv 2604.12391), Table 2 and Figure 7: accumulated acceleration in MACs.
ACCELERATION = {
    "cc3m_vit": 5.68,
    "cc3m_swin": 5.22,
    "merged15m_vit": 2.84,
    "cc3m_vit_3": 4.13,
    "cc3m_vit_7": 7.09,
}
# Table 2, for each link: total MACs in 1e19, speed-up of the model, accumulated speed-up.
TABLE_2 = {
    "cc3m_vit": [(0.62, 1.00, 1.00), (0.32, 4.81, 2.30), (0.59, 6.36, 3.86), (1.41, 7.65, 5.68)],
    "cc3m_swin": [(0.94, 1.00, 1.00), (0.43, 4.58, 2.12), (0.52, 6.69, 3.38), (0.84, 9.35, 5.22)],
    "merged15m_vit": [(3.61, 1.00, 1.00), (2.19, 2.52, 1.57), (2.82, 3.12, 2.08), (6.62, 3.83, 2.84)],
}

# Hashes of jobs that users have trained: their runs must resume.
HASHES = {
    "cc3m_vit": {
        "1-vit_t16": "9d4653933678fc949e2ba327a4a7c0eed7f9352a2ca2e0c830800a168ff077a6",
        "2-vit_s16": "02f129a0fb78a6a20d0ad9fb08b82dc363ead792504ef67a59c1af7acfd93850",
        "3-vit_b16": "d90e8ac338513b181e2bdbcb441299e838d814d3c553eb810ddc2fe7b5914330",
        "4-vit_l16": "f5c974c624146e4a7ccfd4f7d250e33c6a79459feac1b14bfb0ef19d99299948",
        "baseline-vit_t16-s0": "9d4653933678fc949e2ba327a4a7c0eed7f9352a2ca2e0c830800a168ff077a6",
        "baseline-vit_s16-s0": "934295c8ed225aba695ed60bbe600561d84bdc6674f5103921d7882dc27d6303",
        "baseline-vit_b16-s0": "53715b15ff41c6d20ad355130da2f4fc504a95dae6f0e40fe08d59329cc06aba",
        "baseline-vit_l16-s0": "77b4218ddb3982d22ec9417220e132acb772eb1abde390ee533c8d8b528abeda",
    },
    "emoji": {
        "1-vit_nano": "2632ad01de75c01a7720e5587c466e6c9f4a196eafafe06860be4febc0035cd1",
        "2-vit_micro": "e76d2d094b621697a03ca342791cde228a0897344aa2f836004bf9327672560f",
        "3-vit_mini": "caf9ecab26213ba1e751b5daea2b3488fd6415de5b2588e8d2ecfcf298fff4fe",
        "baseline-vit_nano-s0": "2632ad01de75c01a7720e5587c466e6c9f4a196eafafe06860be4febc0035cd1",
        "baseline-vit_micro-s0": "cd3e5a740fa711b851f2f84b9fa7b09b078ff12260ccd7ae4c62b34013a99ee8",
        "baseline-vit_mini-s0": "eca849ffc53141d80a5b756ee47c6171ca4265bb2cf92fe945fc978f4756f558",
        "control-equal_epochs": "ed6e42adb9f1029f929a7dc0f2f809a8b128e6415bbeecfbc1a65d440c5aa12c",
        "control-equal_macs": "49db69dc14f87fcc996ad2850a30c26bc37190b7a9bc2d345d9e04d64f292246",
        "control-equal_chain_macs": "11345f58069dad2b381c2e0ef1fbdd2113de21ecbf1e6727b2b2c0f1b2d07e64",
    },
}


def plan(name: str) -> Plan:
    path = ROOT / "recipes" / f"{name}.yaml"
    return make_plan(load_recipe(path), baselines=True, source=str(path))


def test_the_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {*ACCELERATION, "emoji"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_quickly(path: Path) -> None:
    started = time.perf_counter()
    recipe = load_recipe(path)
    found = make_plan(recipe, baselines=recipe.baselines is not None, source=str(path))
    assert time.perf_counter() - started < 2
    assert recipe.name == path.stem
    assert found.jobs
    assert all(job.steps > job.warmup_steps for job in found.jobs)
    assert recipe.evaluation.primary is not None


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from compt.recipe.read import load_recipe; from compt.plan.jobs import make_plan\n"
        "for path in sys.argv[1:]: make_plan(load_recipe(Path(path)))\n"
        "assert not {'torch', 'open_clip', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, RECIPES)], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", HASHES)
def test_hashes_stay(name: str) -> None:
    # As these recipes were before they named a decoder.
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", ["data.decoder=pillow"])
    assert {job.name: job.hash for job in make_plan(recipe, baselines=True).jobs} == HASHES[name]


@pytest.mark.parametrize("name", ACCELERATION)
def test_the_published_acceleration(name: str) -> None:
    assert plan(name).acceleration("paper") == pytest.approx(ACCELERATION[name], rel=0.01)


@pytest.mark.parametrize("name", ACCELERATION)
def test_the_head_states_the_acceleration_that_plan_shows(name: str) -> None:
    head = (ROOT / "recipes" / f"{name}.yaml").read_text().partition("\nname:")[0].replace("\n# ", " ")
    stated = re.findall(r"`compt plan (\w+) --mode paper` shows ([\d.]+)x", head)
    assert stated == [(name, f"{plan(name).acceleration('paper'):.2f}")]


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name: str) -> None:
    found = plan(name)
    rows = found.rows("paper")[: len(found.links)]
    for row, (macs, speedup, accumulated) in zip(rows, TABLE_2[name], strict=True):
        # Half a digit of the table, and the difference of our counts from Table G.
        assert row["total_macs"] / 1e19 == pytest.approx(macs, rel=0, abs=0.005 + 0.025 * macs)
        assert row["speedup"] == pytest.approx(speedup, rel=0.03)
        assert row["accumulated_speedup"] == pytest.approx(accumulated, rel=0.02)


@pytest.mark.parametrize("name", ACCELERATION)
def test_the_paper_s_settings(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    optimizer = recipe.optimizer
    assert (optimizer.batch, optimizer.lr, optimizer.betas, optimizer.eps) == (1024, 1e-3, (0.9, 0.98), 1e-8)
    assert (optimizer.weight_decay, optimizer.precision, recipe.data.captions) == (0.1, "bf16", 4)
    assert recipe.data.images == (12_927_058 if name.startswith("merged") else 2_753_427)
    assert [link.warmup.steps for link in recipe.chain.links] == [8000] + [1000] * (len(recipe.chain.links) - 1)
    epochs = [link.train.epochs or 0 for link in recipe.chain.links]
    assert epochs == sorted(epochs, reverse=True)
    assert {spec.image_size for spec in recipe.family.specs().values()} == {224}
    assert {spec.context_length for spec in recipe.family.specs().values()} == {77}
    assert plan(name).jobs[len(epochs)].same_as == f"1-{recipe.chain.links[0].model}"
