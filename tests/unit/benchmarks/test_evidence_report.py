"""Tables, verdicts and claims of the evidence study, with made-up results."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.evidence import claims as claims_module
from benchmarks.evidence import family, report, speeds
from benchmarks.evidence.__main__ import CLAIMS, plan_tables
from benchmarks.evidence.claims import Answer, Claim, as_good, better, outcome
from benchmarks.evidence.pieces import (
    CHAINS,
    LENGTHS,
    MEMBERS,
    MORE_SEEDS,
    RECIPE,
    SEEDS,
    SELECT,
    SMALL,
    Arm,
    Piece,
    Rates,
    arms,
    family_arms,
    macs_of,
    pieces,
    quarter_arm,
)
from benchmarks.evidence.run import SETS
from benchmarks.evidence.statistics import Difference
from benchmarks.evidence.study import REPORT, RETRIEVAL, UNSEEN, Saving, Study, mean_r, span
from compt.bench.step import Setup
from compt.errors import RunError
from compt.files import read_json, write_json
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe
from compt.text import TextTable

IMAGES = 4000
"""Each of a concept of its own: a difference of 1 point has a half-width of about 0.3."""
RATES = Rates()


@pytest.fixture
def raw(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    folder = tmp_path / "raw"
    folder.mkdir()
    labels: dict[str, Any] = dict.fromkeys((SELECT, REPORT, UNSEEN, RETRIEVAL), np.arange(IMAGES, dtype=np.uint16))
    np.savez(folder / SETS, **labels)
    return folder


def put(raw: Path, piece: Piece, top1: float, r: float | None = None) -> None:
    """Results of a piece with `top1` percent of its images correct: the first ones, and seeds move by 0.05 points."""
    top1 += 0.05 * piece.seed * (piece.teacher is not None)
    correct = np.arange(IMAGES) < round(top1 / 100 * IMAGES)
    sets = (SELECT, REPORT, UNSEEN, RETRIEVAL)
    bits: dict[str, Any] = {name: np.packbits(correct) for name in sets}
    np.savez(raw / f"{piece.name}.npz", **bits)
    values = {
        "piece": piece.name,
        "model": piece.model,
        "epochs": piece.epochs,
        "seed": piece.seed,
        "teacher": piece.teacher.name if piece.teacher else None,
        "lr": piece.lr,
        "warmup": piece.warmup,
        "alpha": 0.0 if piece.teacher is None else 500.0 if piece.alpha is None else piece.alpha,
        "expanded": piece.expanded,
        "width": piece.width,
        "shards": piece.shards,
        "schedule": piece.schedule,
        "r": r,
        "steps": round(99 * piece.epochs),
        "macs": macs_of(piece),
        "scores": {name: {key: 100 * float(correct.mean()) for key in ("top1", "image_to_text_r1")} for name in sets},
    }
    write_json(raw / f"{piece.name}.json", values)


def put_arm(raw: Path, arm: Arm, top1: float, r: float | None = None, seeds: int = 3) -> None:
    for piece in arm.pieces[:seeds]:
        put(raw, piece, top1, r)


def put_baselines(raw: Path, models: Iterable[str] = MEMBERS, top1: float = 30.0) -> None:
    """Baselines that have `top1` after 40 epochs, with three seeds there; those of 20 epochs are 3 points below."""
    for model, (epochs, below) in itertools.product(models, zip(LENGTHS, (8, 3, 0, -0.5, -0.8, -1), strict=True)):
        for seed in range(3 if epochs == 40 else 1):
            put(raw, RATES.baseline(model, epochs, seed), top1 - below)


def cells(table: TextTable, row: int) -> dict[str, str]:
    return dict(zip(table.header, table.rows[row], strict=True))


# The family


def test_each_member_has_its_verdict(raw: Path) -> None:
    put_baselines(raw, "abc")
    _, b, c, d = family_arms(RATES)
    put_arm(raw, b, 30.2)
    put_arm(raw, c, 27.0)
    put_arm(raw, d, 33.0, seeds=1)
    put(raw, RATES.baseline("d", 40), 33.0)
    quality, costs = family.family_tables(Study(raw))
    rows = [cells(quality, at) for at in range(4)]
    assert [row["margin 1"] for row in rows] == ["is the baseline", "lossless", "not lossless", "1 of 3 seeds"]
    assert [row["mean above -0.5"] for row in rows] == ["-", "yes", "no", "yes"]
    assert [row["seeds"] for row in rows] == ["3", "3", "3", "1"]
    assert rows[1]["points against it [95 %]"].startswith("+0.25 [")
    assert rows[2]["unseen concepts [95 %]"].startswith("-2.95 [")
    # MACs: each alone, and the sum of baselines over that of the chain.
    alone = [macs_of(Piece(model, 40)) for model in MEMBERS]
    paid = [macs_of(piece) for piece in d.pieces[0].chain]
    assert [row[2] for row in costs.rows] == [f"{one / other:.2f}" for one, other in zip(alone, paid, strict=True)]
    assert [row[3] for row in costs.rows] == [f"{sum(alone[:n]) / sum(paid[:n]):.2f}" for n in (1, 2, 3, 4)]
    # a is itself; b at 30.2 lies between 40 and 80 epochs, c is a baseline of 20; that of d is not known.
    assert [row[6].partition(" ")[0] for row in costs.rows] == ["40", "53", "20", "-"]
    assert costs.rows[3][7:] == ["-"] * 2
    assert {cell for row in costs.rows for cell in row[4:6]} == {"-"}, "no speeds yet"


def test_one_seed_is_undecided_and_missing_members_end_the_sums(raw: Path) -> None:
    put_baselines(raw)
    _, b, c, d = family_arms(RATES)
    put_arm(raw, b, 29.0)
    put_arm(raw, d, 30.0, seeds=1)
    quality, costs = family.family_tables(Study(raw))
    assert [row[6] for row in quality.rows] == ["is the baseline", "undecided", "missing", "1 of 3 seeds"]
    assert [row[3] == "-" for row in costs.rows] == [False, False, True, True]
    assert costs.rows[3][2] != "-", "alone it saves what it saves"
    put_arm(raw, c, 30.0)
    assert all(row[3] != "-" for row in family.family_tables(Study(raw))[1].rows)


def test_rows_are_of_common_seeds(raw: Path) -> None:
    put_baselines(raw, "b")
    b = family_arms(RATES)[1]
    put(raw, b.pieces[0], 29.0)
    put(raw, b.pieces[2], 33.0)
    (raw / f"{RATES.baseline('b', 40, 2).name}.json").unlink()
    row = cells(family.family_tables(Study(raw))[0], 1)
    assert (row["seeds"], row["top-1, %"]) == ("1", "29.00")


def test_the_family_s_saving_is_at_equal_accuracy(raw: Path) -> None:
    """Of the seeds that all members have, and never overstated where baselines are too short or too long."""
    put_baselines(raw)
    chain = family_arms(RATES)
    for arm in chain[1:]:
        put_arm(raw, arm, 28.5, seeds=1)

    def saved(last: bool = False) -> Saving:
        study = Study(raw)
        found = study.saving([study.find(arm.pieces) for arm in chain], "macs", last)
        assert found is not None
        return found

    found = saved()
    paid = sum(macs_of(piece) for piece in chain[-1].pieces[0].chain)
    # 28.5 lies halfway between 20 epochs and 40, by their logarithm.
    alone = macs_of(Piece("a", 40)) + sum(macs_of(Piece(model, 20 * 2**0.5)) for model in "bcd")
    assert found.ratio == pytest.approx(alone / paid, rel=0.01)
    assert found.low < found.ratio < found.high
    assert found.by_seed == [found.ratio]
    assert saved(last=True).ratio == pytest.approx(macs_of(Piece("d", 20 * 2**0.5)) / paid, rel=0.01)
    rows = {row[0]: row for row in family.savings_of_chains(Study(raw)).rows}
    # a of 40 epochs is as good as each other baseline of 40.
    control = cells(family.savings_of_chains(Study(raw)), list(rows).index("a(40), expanded exactly and not trained"))
    each = [macs_of(Piece(model, 40)) for model in MEMBERS]
    assert control["MACs x [95 %]"].startswith(f"{sum(each) / each[0]:.2f} [")
    assert (control["mean, %"], control["d, %"]) == ("30.00", "30.00")
    assert Study(raw).saving([Study(raw).find(arm.pieces) for arm in chain], "seconds") is None, "no speeds"
    put_arm(raw, chain[3], 40.0, seeds=1)
    assert saved().ratio == pytest.approx((alone + macs_of(Piece("d", 320 - 20 * 2**0.5))) / paid, rel=0.01)
    put_arm(raw, chain[3], 5.0, seeds=1)
    assert saved().ratio == pytest.approx((alone - macs_of(Piece("d", 20 * 2**0.5))) / paid, rel=0.01)
    for arm in chain[1:]:
        put_arm(raw, arm, 28.5)
    for model in "bcd":
        put(raw, Piece(model, 13, 1, lr=RATES.baseline(model, 13).lr), 25.0)
    assert len(saved().by_seed) == 1, "other seeds have baselines of one of the curve's lengths"
    for model, seed in itertools.product("bcd", (1, 2)):
        put(raw, RATES.baseline(model, 20, seed), 27.0)
    assert len(saved().by_seed) == 3
    table = family.savings_of_chains(Study(raw))
    assert cells(table, 0)["seeds"] == "3"
    assert cells(table, 0)["MACs x [95 %]"].startswith(f"{saved().ratio:.2f} [")
    (raw / f"{chain[2].pieces[0].name}.json").unlink()
    assert len(saved().by_seed) == 2


def test_equal_accuracy_takes_the_seeds_that_have_baselines_around(raw: Path) -> None:
    put_baselines(raw, "b")
    b = family_arms(RATES)[1]
    put_arm(raw, b, 28.45)
    one = Study(raw).equal(Study(raw).find(b.pieces))
    assert one is not None
    assert (one.seeds, round(one.epochs)) == (1, 28), "the other seeds have 40 epochs alone"
    for seed in (1, 2):
        put(raw, RATES.baseline("b", 20, seed), 27.1)
    three = Study(raw).equal(Study(raw).find(b.pieces))
    assert three is not None
    assert three.seeds == 3
    # 28.5 between the means 27.07 and 30.
    assert three.epochs == pytest.approx(20 * 2 ** (1.43 / 2.93), rel=0.01)
    assert span(three).endswith("], 3 seeds")


def test_chains_are_drawn_at_their_cost_so_far(raw: Path) -> None:
    put_baselines(raw)
    for arm, top1 in zip(family_arms(RATES), (30.0, 29.0, 28.0, 27.0), strict=True):
        put_arm(raw, arm, top1, seeds=1)
    study, axis = Study(raw), Figure().add_subplot()
    family.draw_family(study, axis)
    *alone, chain = axis.get_lines()
    macs = [macs_of(piece) / 1e12 for piece in family_arms(RATES)[-1].pieces[0].chain]
    assert list(chain.get_xdata()) == pytest.approx(list(itertools.accumulate(macs)))
    assert list(chain.get_ydata()) == pytest.approx([30, 29, 28, 27])
    assert [line.get_label() for line in alone] == ["a alone", "b alone", "c alone", "d alone"]
    assert list(alone[3].get_ydata()) == pytest.approx([22, 27, 30, 30.5, 30.8, 31], abs=0.02)
    assert alone[3].get_xdata()[2] == pytest.approx(macs_of(Piece("d", 40)) / 1e12)


def test_without_results_all_is_missing(raw: Path) -> None:
    (raw / SETS).unlink()
    study = Study(raw)
    assert [row[6] for row in family.family_tables(study)[0].rows] == ["missing"] * 4
    assert {claim.outcome for claim in claims_module.claims(study)} == {"not measured"}
    assert set(report.files(study)) == {
        "tables.md",
        *(f"{name}.svg" for name in ("family", "lengths", "links", "savings")),
    }


def test_the_curve_has_all_measured_lengths(raw: Path) -> None:
    put_baselines(raw, "ab")
    for epochs, top1 in ((5, 20.0), (20, 29.0), (40, 30.5)):
        put(raw, RATES.link("b", epochs, RATES.baseline("a", 80)), top1)
    put(raw, RATES.link("b", 20, RATES.baseline("a", 80, 1)), 29.0)
    put(raw, RATES.link("b", 10, RATES.baseline("a", 40)), 25.0)  # of another teacher
    study = Study(raw)
    found = family.lengths_of_links(study, 3e-3)
    assert [(epochs, one.seeds, round(one.mean, 1)) for epochs, one in found] == [
        (5, 1, -10.5),
        (20, 1, -1.5),
        (40, 1, 0.0),
    ]
    assert family.lengths_of_links(study, 1e-3) == []


# Device time


def test_device_times_are_steps_times_measured_seconds(raw: Path) -> None:
    put_baselines(raw, "ab")
    _, b, *_ = family_arms(RATES)
    put_arm(raw, b, 30.0)
    put(raw, replace(RATES.link("b", 20, RATES.baseline("a", 80)), alpha=0.0), 30.0)
    timed = (("a", None, 0.03), ("b", None, 0.08), ("b", "a", 0.1))
    steps = [{"model": model, "teacher": teacher, "seconds": seconds} for model, teacher, seconds in timed]
    write_json(raw.parent / "speeds.json", {"steps": steps})
    study = Study(raw)
    costs = family.family_tables(study)[1]
    assert costs.rows[1][4:6] == [f"{80 * 0.08 / (20 * 0.1):.2f}", f"{80 * 0.11 / (80 * 0.03 + 20 * 0.1):.2f}"]
    plain = study.by_name["b-e20-s0-w50-alpha0-from-a-e80-s0"]
    assert study.seconds(plain) == pytest.approx(20 * 99 * 0.08), "its teacher takes no part"
    assert study.seconds({**plain, "model": "c"}) is None
    rows = [cells(report.baseline_table(study), at) for at in range(4)]
    assert rows[3]["minutes (steps x measured seconds)"] == f"{80 * 99 * 0.03 / 60:.1f}"
    table = report.link_table(study)
    rows = [cells(table, at) for at in range(len(table.rows))]
    times = {row["alpha"]: row["device time x (steps x measured seconds)"] for row in rows if row["epochs"] == "20"}
    assert times == {"0": f"{80 * 0.08 / (20 * 0.08):.2f}"}


def test_plans_use_measured_seconds_where_there_are_any(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    piece = RATES.link("b", 20, Piece("a", 80))
    assert speeds.idle_minutes(piece, {("b", "a"): 0.1}) == pytest.approx(20 * 99 * 0.1 / 60)
    assert speeds.pair_of(replace(RATES.link("b", 20, Piece("a", 80)), alpha=0.0)) == ("b", None), (
        "its teacher takes no part"
    )
    rough = speeds.idle_minutes(piece, {("b", None): 0.1})
    assert rough == pytest.approx(macs_of(piece) / macs_of(Piece("b", 20)) * 20 * 99 * 128 / 1700 / 60)


def test_all_pairs_are_timed_as_chains_run_them(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round times every pair; the setups are those of the recipe's own jobs, as for --estimate."""
    monkeypatch.chdir(root)
    wanted = speeds.pairs(pieces(Rates()))
    assert {("a", None), ("d", None), ("cd", None), ("b", "a"), ("c", "b"), ("d", "c"), ("d", "a")} <= set(wanted)
    order: list[Setup] = []

    class Step:
        def __init__(self, setup: Setup, device: object) -> None:
            self.setup = setup

        def data(self, batch: int) -> int:
            return batch

        def seconds(self, data: int, seconds: float) -> list[float]:
            order.append(self.setup)
            assert data == 128
            return [1.0, 9.0, float(len(order))]

    monkeypatch.setattr(speeds, "TrainingStep", Step)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = speeds.measure([("a", None), ("b", "a")], rounds=3)
    plan = make_plan(load_recipe(RECIPE, []))
    jobs = [Setup.of_job(job, plan.recipe, Path()) for job in plan.jobs[:2]]
    assert order == 3 * jobs
    assert found[1] == {"model": "b", "teacher": "a", "seconds": 4.0, "low": 2.0, "high": 6.0}

    out = tmp_path / "speeds.json"
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0, 0))
    with pytest.raises(RunError, match=r"load average is 1\.5"):
        speeds.write_speeds([("a", None)], out)
    assert speeds.read_speeds(out) == {}
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    speeds.write_speeds([("a", None)], out)
    assert speeds.read_speeds(out).keys() == {("a", None)}
    about = read_json(out)
    assert (about["threads"], about["load_average"], about["batch"]) == (1, 0.1, 128)
    assert about["versions"]["torch"]


# Claims


def test_the_command_line_knows_every_claim(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = [one.letter for one in claims_module.claims(Study(raw))]
    assert judged == sorted(arms(RATES)) == list(CLAIMS)
    monkeypatch.setattr("benchmarks.evidence.__main__.Study", lambda: Study(raw))
    monkeypatch.setattr("benchmarks.evidence.__main__.is_done", lambda piece: piece == RATES.baseline("a", 80))
    monkeypatch.setattr("benchmarks.evidence.__main__.read_speeds", dict)
    everything, by_claim = plan_tables()
    assert len(everything.rows) == len(list(pieces(Rates()))) - 1
    assert {row[0]: row[1] for row in by_claim.rows}["j"] == "18"
    (own,) = plan_tables("f")
    assert [row[0] for row in own.rows][:2] == [
        "b-e20-s0-w50-from-a-e80-s0",
        "b-e20-s0-w50-alpha0-from-a-e80-s0",
    ]


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["yes", "yes"], "holds"),
        (["yes", "open"], "undecided"),
        (["yes", "missing"], "undecided"),
        (["open", "missing"], "undecided"),
        (["missing", "missing"], "not measured"),
        (["yes", "no"], "does not hold"),
        (["missing", "no"], "does not hold"),
    ],
)
def test_parts_decide_a_claim(answers: list[Answer], wanted: str) -> None:
    assert outcome(answers) == wanted


def test_parts_follow_from_intervals() -> None:
    above = Difference(1.0, 0.2, 1.8, 3)
    found = {
        "above": above,
        "slightly below": Difference(-0.4, -0.9, -0.1, 3),
        "below": Difference(-3.0, -3.5, -2.5, 3),
        "spans": Difference(0.1, -2.0, 2.2, 3),
        "one seed": replace(above, seeds=1),
    }
    assert [as_good("", one).answer for one in found.values()] == ["yes", "yes", "no", "open", "open"]
    assert [better("", one).answer for one in found.values()] == ["yes", "no", "no", "open", "open"]
    assert as_good("", None).answer == better("", None).answer == "missing"
    # With fewer seeds than planned, no answer.
    assert [test("", replace(above, seeds=2)).answer for test in (as_good, better)] == ["open", "open"]
    assert as_good("", above, planned=6).words == ": +1.00 [+0.20, +1.80], open, 3 of 6 seeds"
    assert as_good("", replace(above, seeds=6), planned=6).answer == "yes"


def claim(raw: Path, letter: str) -> Claim:
    return next(one for one in claims_module.claims(Study(raw)) if one.letter == letter)


def test_lossless_members(raw: Path) -> None:
    put_baselines(raw)
    links = family_arms(RATES)[1:]
    assert claim(raw, "a").outcome == "not measured"
    put_arm(raw, links[0], 30.0)
    assert claim(raw, "a").outcome == "undecided"
    assert "a(40) → b(10): +0.05 [" in claim(raw, "a").sentence
    put_arm(raw, links[1], 30.5)
    put_arm(raw, links[2], 29.9)
    for design in (CHAINS[1], CHAINS[4]):
        assert claim(raw, "a").outcome == "undecided", "all chains count"
        for arm in family_arms(RATES, design=design)[1:]:
            put_arm(raw, arm, 31.0)
            for seed in SEEDS:
                put(raw, RATES.baseline(arm.pieces[0].model, design.epochs, seed), 31.0)
    assert claim(raw, "a").outcome == "holds"
    put_arm(raw, links[2], 27.0)
    assert claim(raw, "a").outcome == "does not hold"
    for seed in SEEDS:
        (raw / f"{RATES.baseline('d', 40, seed).name}.json").unlink()
    assert claim(raw, "a").outcome == "undecided"


def test_lossless_members_on_few_images(raw: Path) -> None:
    """Against baselines on as many images; those on all of them do not count."""
    put_baselines(raw)
    chains = [family_arms(RATES, design=design) for design in SMALL]
    for arm in chains[0] + chains[1]:
        put_arm(raw, arm, 12.0, seeds=len(MORE_SEEDS))
    assert claim(raw, "k").outcome == "not measured"
    first, shards = SMALL[0].epochs, SMALL[0].shards
    for model, seed in itertools.product(MEMBERS[1:], MORE_SEEDS):
        put(raw, RATES.baseline(model, first, seed, shards), 12.0)
        put(raw, RATES.baseline(model, first / 2, seed, shards), 11.0)
    found = claim(raw, "k")
    assert (found.outcome, found.table.title) == ("holds", "(k) Chains on 1,594 images, and their members alone")
    assert claim(raw, "a").outcome == "not measured"
    saved = {row[0]: row for row in family.savings_of_chains(Study(raw)).rows}
    each = [macs_of(Piece(model, first, shards=shards)) for model in MEMBERS]
    parts = [*chains[0][1:], chains[1][-1]]
    assert [part.what for part in found.parts] == [arm.name for arm in parts], "the two chains share b and c"
    names = ("a(320) → b(80) → c(64) → d(53), 1,594 images", "a(320) → b(80) → c(64) → d(40), 1,594 images")
    for name, chain in zip(names, chains[:2], strict=True):
        paid = sum(macs_of(piece) for piece in chain[-1].pieces[0].chain)
        assert float(saved[name][4].split(" ")[0]) == pytest.approx(sum(each) / paid, rel=0.01)
    quality, costs = family.family_tables(Study(raw), SMALL[0])
    assert [row[6] for row in quality.rows] == ["is the baseline", "lossless", "lossless", "lossless"]
    assert costs.rows[-1][1] == "320"
    put(raw, chains[0][1].pieces[0], 9.0)
    changed = claim(raw, "k")
    assert changed.parts[0].words != found.parts[0].words
    assert changed.remark == found.remark, "seed 0 chose this regime"
    put_arm(raw, chains[1][-1], 9.0, seeds=len(MORE_SEEDS))
    assert claim(raw, "k").outcome == "does not hold"


def test_every_length(raw: Path) -> None:
    """Links of a quarter after 20, 40 and 80 epochs; the costs of a are those of its length."""
    put_baselines(raw, "ab")
    links, alone = arms(RATES)["e"][::2], arms(RATES)["e"][1::2]
    for link, baseline in zip(links, alone, strict=True):
        put_arm(raw, baseline, 28.0)
        put_arm(raw, link, 28.0)
    put_arm(raw, alone[1], 30.0)
    found = claim(raw, "e")
    assert found.outcome == "does not hold"
    assert "20 epochs: +0.05 [" in found.sentence
    all_images = [["12,759", "20", "5", "3"], ["12,759", "40", "10", "3"], ["12,759", "80", "20", "3"]]
    assert [row[:4] for row in found.table.rows] == all_images
    row = cells(found.table, 1)
    # As good as 28.05 % between 20 epochs with 28 and 40 with 30: 20 x 2 ** 0.025.
    assert row["epochs of equal accuracy [95 %]"].startswith("20 [")
    a, b, link_cost = (macs_of(piece) for piece in (Piece("a", 40), Piece("b", 20.35), links[1].pieces[0]))
    assert float(row["MACs x"]) == pytest.approx(b / link_cost, rel=0.01)
    assert float(row["MACs x, a and b"]) == pytest.approx((a + b) / (a + link_cost), rel=0.01)
    put_arm(raw, links[1], 29.9)
    assert claim(raw, "e").outcome == "holds"
    axis = Figure().add_subplot()
    family.draw_savings(Study(raw), axis)
    link_alone, both = axis.containers
    assert list(link_alone[0].get_xdata()) == [20, 40, 80]
    far, near = (abs(one[0].get_ydata() - 1) for one in (link_alone, both))
    assert (far > near).all(), "a costs the same on both sides"


def test_parts_of_the_images_have_their_own_baselines(raw: Path) -> None:
    """A link on an eighth of the images, between two baselines there."""
    put_baselines(raw, "ab")
    for model, epochs in itertools.product("ab", (40, 80)):
        put(raw, Piece(model, epochs, shards=1), epochs / 10)
        # The same at a constant rate is no baseline.
        put(raw, Piece(model, epochs, shards=1, schedule="constant"), 1.0)
    link = quarter_arm(RATES, 40, shards=1).pieces[0]
    put(raw, link, 6.0)
    row = cells(claim(raw, "e").table, 0)
    assert (row["images"], row["a, %"], row["b alone, %"]) == ("1,594", "4.00", "4.00")
    # 6 % lies half-way between 4 % at 40 epochs and 8 % at 80.
    assert row["epochs of equal accuracy [95 %]"].startswith("57 [")
    cost = macs_of(Piece("b", 40, shards=1)) / 40 * 56.7 / macs_of(link)
    assert float(row["MACs x"]) == pytest.approx(cost, rel=0.02)
    links = [line for line in report.link_table(Study(raw)).rows if "1,594 images" in line[0]]
    assert [line[8] for line in links] == ["40"], "against the baseline of as many images"


def test_prepending(raw: Path) -> None:
    *chains, alone = arms(RATES)["b"]
    put_baselines(raw)
    for arm in chains:
        put_arm(raw, arm, 30.0)
    assert claim(raw, "b").outcome == "holds"
    costs = [macs_of(Piece("d", 40)) / sum(map(macs_of, arm.pieces[0].chain)) for arm in chains]
    assert f"costs {', '.join(f'{cost:.2f}' for cost in costs)} times" in claim(raw, "b").sentence
    assert [row[0] for row in claim(raw, "b").table.rows][-1] == alone.name == "d alone, 40"
    assert costs == sorted(costs)
    put_arm(raw, chains[0], 20.0)
    assert claim(raw, "b").outcome == "does not hold"


def test_more_members(raw: Path) -> None:
    three, four, seven = arms(RATES)["c"]
    put_arm(raw, three, 30.0)
    assert claim(raw, "c").outcome == "not measured"
    put_arm(raw, four, 30.0)
    put_arm(raw, seven, 30.4)
    found = claim(raw, "c")
    assert found.outcome == "holds"
    assert [row[0] for row in found.table.rows] == [
        "a(40) → bc(10) → d(8)",
        "a(40) → b(10) → c(8) → d(7)",
        "a(40) → ab(10) → b(8) → bc(7) → c(6) → cd(6) → d(5)",
    ]
    put_arm(raw, seven, 20.0)
    assert claim(raw, "c").outcome == "does not hold"


def test_ratios(raw: Path) -> None:
    for arm, top1 in zip(arms(RATES)["d"], (31.0, 29.0, 35.0, 34.0, 32.0), strict=True):
        put_arm(raw, arm, top1)
    assert claim(raw, "d").outcome == "holds"
    put_arm(raw, arms(RATES)["d"][4], 35.0)
    assert claim(raw, "d").outcome == "undecided"
    put_arm(raw, arms(RATES)["d"][4], 37.0)
    assert claim(raw, "d").outcome == "does not hold"


def test_initialization_and_distillation(raw: Path) -> None:
    ways = arms(RATES)["f"]
    for arm, top1 in zip(ways, (30.0, 28.0, 26.0, 24.0, 29.0), strict=True):
        put_arm(raw, arm, top1)
    assert claim(raw, "f").outcome == "holds"
    assert [row[0] for row in claim(raw, "f").table.rows][:4] == ["both", "IWI alone", "IFD alone", "neither"]
    put_arm(raw, ways[4], 31.0)
    assert claim(raw, "f").outcome == "does not hold", "b alone is better for the same MACs"
    put_arm(raw, ways[4], 29.0)
    put_arm(raw, ways[1], 30.0)
    assert claim(raw, "f").outcome == "undecided", "IFD adds nothing"
    put_arm(raw, ways[2], 22.0)
    assert claim(raw, "f").outcome == "does not hold"


def test_the_weight_of_distillation(raw: Path) -> None:
    ways = arms(RATES)["g"]
    put_arm(raw, ways[0], 28.0)
    for arm, r, top1 in zip(ways[1:], (0.06, 0.12, 0.4, 1.1), (29.0, 31.0, 29.0, 26.0), strict=True):
        put_arm(raw, arm, top1, r)
    found = claim(raw, "g")
    assert found.outcome == "holds"
    assert "alpha 1000 (r 0.12) is better than alpha 10000: +5.00 [" in found.sentence
    assert mean_r(Study(raw).find(ways[2].pieces)) == pytest.approx(0.12)
    put_arm(raw, ways[3], 32.0, 0.4)
    assert claim(raw, "g").outcome == "does not hold", "a larger one is better"
    put_arm(raw, ways[2], 34.0, 0.3)
    assert claim(raw, "g").outcome == "not measured", "none is near 0.1"


def test_operators(raw: Path) -> None:
    ways = arms(RATES)["h"]
    for arm, top1 in zip(ways, (30.0, 29.0, 30.2, 30.0), strict=True):
        put_arm(raw, arm, top1)
    assert claim(raw, "h").outcome == "holds"
    assert [row[0] for row in claim(raw, "h").table.rows] == ["insert", "net2net", "insert_exact", "netexpand"]
    assert "a-e80 → b (netexpand)" in [row[0] for row in report.link_table(Study(raw)).rows]
    put_arm(raw, ways[1], 32.0)
    assert claim(raw, "h").outcome == "does not hold"


def test_retrieval_and_unseen_concepts(raw: Path) -> None:
    put_baselines(raw)
    for arm in family_arms(RATES)[1:]:
        put_arm(raw, arm, 30.0)
    found = claim(raw, "i")
    assert found.outcome == "holds"
    assert [part.what for part in found.parts][:2] == ["a(40) → b(10), retrieval", "a(40) → b(10), unseen concepts"]
    assert found.table.rows[0][:5] == ["a(40) → b(10)", "3", "30.05", "30.00", "+0.05 [-0.03, +0.13]"]
    put_arm(raw, family_arms(RATES)[-1], 25.0)
    assert claim(raw, "i").outcome == "does not hold"


def test_instead(raw: Path) -> None:
    whole, (alone, longer), students = arms(RATES)["j"][:4], arms(RATES)["j"][4:6], arms(RATES)["j"][6:]
    put_arm(raw, whole[3], 30.0)
    assert claim(raw, "j").outcome == "not measured"
    put_arm(raw, alone, 28.0)
    assert claim(raw, "j").outcome == "undecided"
    put_arm(raw, longer, 28.0)
    assert claim(raw, "j").outcome == "holds"
    put_arm(raw, students[3], 40.0)
    assert claim(raw, "j").outcome == "holds", "classical distillation is in the table alone"
    assert [cells(claim(raw, "j").table, at)["test sets, %"] for at in (3, 9)] == ["30.05", "40.05"]
    put_arm(raw, alone, 32.0)
    assert claim(raw, "j").outcome == "does not hold"
    put_arm(raw, alone, 30.0)
    assert claim(raw, "j").outcome == "undecided"
