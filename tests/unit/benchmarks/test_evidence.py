"""The evidence study: its pieces, its statistics, and the report of the committed raw results."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from benchmarks.evidence import pieces as pieces_module
from benchmarks.evidence import report, run
from benchmarks.evidence.pieces import (
    AGAIN,
    ALL,
    CHAINS,
    EQUAL_MACS,
    EQUAL_PAIR,
    EQUAL_TIME,
    FIRST,
    LENGTHS,
    MEMBERS,
    MORE_SEEDS,
    RATES,
    SEEDS,
    SELECT,
    SMALL_RATES,
    Piece,
    Rates,
    arms,
    classical,
    families,
    family_arms,
    macs_of,
    pieces,
    pieces_of,
    quarter_arm,
    shares_of,
    small_trials,
)
from benchmarks.evidence.power import simulated
from benchmarks.evidence.statistics import MARGIN, difference, equal_length, quantile
from benchmarks.evidence.study import FINGERPRINT, REPORT, RETRIEVAL, UNSEEN, Study
from compt.errors import RunError
from compt.files import write_json
from compt.models.clip import build
from compt.models.init import DrawnState
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe
from compt.weights.artefact import read_artefact
from tests.helpers.optional import optional
from tests.helpers.shards import make_shards

# Pieces


def test_teachers_come_before_students_and_no_piece_twice() -> None:
    planned = list(pieces(Rates({"b": 1e-3})))
    names = [piece.name for piece in planned]
    assert len(set(names)) == len(names)
    for at, piece in enumerate(planned):
        assert piece.teacher is None or names.index(piece.teacher.name) < at
    assert Piece("b", LENGTHS[-1], lr=1e-3) in planned, "a model's own rate"
    assert Piece("b", LENGTHS[-1]) not in planned


def test_each_model_costs_about_three_times_its_predecessor() -> None:
    macs = [macs_of(Piece(model, 10)) for model in MEMBERS]
    for small, large in itertools.pairwise(macs):
        assert 2.7 < large / small < 3.7


def test_a_piece_is_a_recipe_of_one_run(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    teacher = Piece("a", 40)
    recipe = teacher.recipe(tmp_path)
    assert make_plan(recipe).jobs[0].epochs == pytest.approx(40, abs=0.1)
    link = Piece("b", 10, 1, teacher, 1e-3, warmup=50, alpha=0.0).recipe(tmp_path)
    assert link.chain.from_ == str(tmp_path / "a-e40-s0" / "jobs" / "1-a" / "model")
    assert (link.seed, link.chain.links[0].lr, link.chain.links[0].alpha) == (1, 1e-3, 0.0)
    wide = Piece("b", 10, 0, teacher, width="netexpand")
    assert wide.name == "b-e10-s0-w200-netexpand-from-a-e40-s0"
    assert wide.recipe(tmp_path).chain.links[0].expand.width == "netexpand"
    steady = replace(teacher, schedule="constant")
    assert (steady.name, steady.recipe(tmp_path).optimizer.schedule.shape) == ("a-e40-s0-constant", "constant")
    few = quarter_arm(Rates(quarter={"b": 1e-2}), 40, shards=1).pieces[0]
    assert few.name == "b-e10-s0-lr0.01-shards1-w50-from-a-e40-s0-shards1"
    assert few.recipe(tmp_path).data.images == 1594
    assert macs_of(Piece("b", 10, 0, teacher)) > macs_of(Piece("b", 10))


def test_what_is_committed_is_among_the_pieces(root: Path) -> None:
    """A piece with another name is trained again."""
    names = {piece.name for rates in (Rates(), run.own_rates(root / run.RAW)) for piece in pieces(rates)}
    assert {path.stem for path in (root / run.RAW).glob("*.json")} <= names
    assert Piece("b", 10, 0, Piece("a", 80), 1e-3, 300).name == "b-e10-s0-lr0.001-w300-from-a-e80-s0"
    whole = family_arms(Rates(quarter={"d": 6e-4}))[-1].pieces[2]
    assert whole.name == "d-e7-s2-lr0.0006-w50-from-c-e8-s2-w50-from-b-e10-s2-w50-from-a-e40-s2"


def test_links_choose_among_the_rates_of_baselines_one_after_the_other(tmp_path: Path) -> None:
    """The trials of c grow from b at its best rate; a model without trials has its first rate."""

    def put(piece: Piece, top1: float) -> None:
        values = {"scores": {SELECT: {"top1": top1}}, "lr": piece.lr}
        write_json(tmp_path / f"{piece.name}.json", values)

    for rate, top1 in zip(RATES["b"][:3], (1, 2, 1.5), strict=True):
        put(Piece("b", 20, lr=rate), top1)
    assert run.own_rates(tmp_path) == Rates(), "not all were tried"
    put(Piece("b", 20, lr=RATES["b"][3]), 3)
    assert run.own_rates(tmp_path) == Rates({"b": 1.7e-3})
    for piece, top1 in zip(Rates({"b": 1.7e-3}).trials("b"), (1, 4, 2, 3, 2, 1), strict=True):
        put(piece, top1)
    assert run.own_rates(tmp_path) == Rates({"b": 1.7e-3}, {"b": 1e-3})
    of_others = Rates({"b": 1.7e-3}).trials("c")
    put(of_others[1], 9)
    assert run.own_rates(tmp_path).quarter == {"b": 1e-3}
    for piece, top1 in zip(run.own_rates(tmp_path).trials("c"), (1, 5, 4), strict=True):
        put(piece, top1)
    found = run.own_rates(tmp_path)
    assert found.quarter == {"b": 1e-3, "c": 1.7e-3}
    assert found.link("bc", 7, Piece("a", 40)).lr == 1.7e-3, "between b and c, that of c"
    assert (found.baseline("d", 9).lr, found.link("d", 9, Piece("a", 40)).lr) == (1e-3, 1e-3)
    assert found.quick == {}, "the chain of short links has trials of its own"
    for piece, top1 in zip(found.trials("b", "quick"), (1, 2, 3), strict=True):
        assert (piece.epochs, piece.teacher) == (5, Piece("a", 80))
        put(piece, top1)
    assert run.own_rates(tmp_path).quick == {"b": 1e-2}
    assert run.own_rates(tmp_path).link("b", 5, Piece("a", 80), "quick").lr == 1e-2
    # On few images, one after the other too; what is on all images does not wait for them.
    few = Rates(small={("b", 320): 3e-3}, few={"b": 6e-3}, quarter={"c": 1e-3}, quick={"c": 1e-3})
    tried = few.trials("c", "few")
    assert {(one.epochs, one.shards, one.teacher and one.teacher.lr) for one in tried} == {(80, 1, 6e-3)}
    assert [few._settled(one) for one in tried] == [True] * 3
    before = Rates(small={("b", 320): 3e-3}, quarter={"b": 1e-2}, quick={"b": 3e-3})
    assert [before._settled(one) for one in before.trials("c", "few")] == [False] * 3, "b's rate is open"
    c = few.link("c", 8, few.baseline("b", 40))
    assert few._settled(c)
    assert not few._settled(replace(c, shards=1))
    for piece, top1 in zip(run.own_rates(tmp_path).trials("b", "few"), (1, 3, 2), strict=True):
        put(piece, top1)
    assert run.own_rates(tmp_path).few == {"b": 6e-3}


def test_baselines_on_few_images_choose_rates_of_their_own(tmp_path: Path) -> None:
    rates = Rates({"b": 1.7e-3}, small={("b", 320): 3e-3, ("c", 160): 1e-3})
    assert rates.baseline("b", 320, 1, shards=1).lr == 3e-3
    assert {rates.baseline("b", 320, 1, shards).lr for shards in (2, ALL)} == {1.7e-3}
    assert rates.baseline("b", 160, 1, shards=1).lr == 1.7e-3, "shorter ones were not tried"
    assert rates.baseline("c", 320, shards=1).lr == rates.baseline("c", 320).lr, "no trials yet"
    assert [rates.settled(rates.baseline(model, 320, 1, shards=1)) for model in "bcd"] == [True, False, False]
    assert [rates.settled(rates.baseline(model, 160, 1, shards=1)) for model in "cd"] == [True, False]
    tried = small_trials("d", 320)
    assert all(map(rates.settled, tried))
    for piece, top1 in zip(tried, (1, 3, 2), strict=True):
        assert run.own_rates(tmp_path).small == {}
        write_json(tmp_path / f"{piece.name}.json", {"scores": {SELECT: {"top1": top1}}, "lr": piece.lr})
    assert run.own_rates(tmp_path) == Rates(small={("d", 320): 1e-3})


def test_pieces_wait_for_the_rates_on_which_they_depend() -> None:
    rates = Rates({"a": 3e-3, "b": 1.7e-3, "c": 1e-3}, {"b": 3e-3})
    assert rates.settled(rates.baseline("c", 80, 1))
    assert not rates.settled(rates.baseline("d", 80))
    assert rates.settled(Piece("d", 20, lr=6e-4)), "a trial"
    first = rates.baseline("a", 40)
    b = rates.link("b", 10, first)
    assert rates.settled(b)
    assert all(rates.settled(piece) for piece in rates.trials("c"))
    assert not rates.settled(rates.link("c", 16, b))
    assert rates.settled(rates.trials("b", "quick")[0])
    assert not rates.settled(rates.link("b", 20, first)), "b's rate in the other chain is open"
    assert not any(rates.settled(piece) for piece in rates.trials("d")), "c's rate is open"
    assert [rates.settled(arm.pieces[0]) for arm in classical(rates)] == [False] * 4, "d's rate is open"
    assert not any(Rates({"a": 3e-3}).settled(piece) for piece in Rates().trials("c"))
    small = {(model, epochs): 1e-3 for epochs, tried in SMALL_RATES.items() for model in tried}
    chosen = Rates(*(dict.fromkeys(MEMBERS, 1e-3) for _ in range(4)), small)
    assert all(map(chosen.settled, pieces(chosen)))


def test_processes_share_pieces_and_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process takes the second piece, then waits for the first's, which brings a third."""
    monkeypatch.chdir(tmp_path)
    pieces = [Piece("a", 1), Piece("a", 2), Piece("b", 3)]
    said: list[str] = []
    order: list[str] = []
    done: set[str] = set()

    def planned() -> list[Piece]:
        return pieces[:2] if pieces[0].name not in done else pieces

    def train(piece: Piece) -> None:
        order.append(piece.name)
        release.set()

    def first_process() -> None:
        with FileLock(run.RUNS / f"{pieces[0].name}.lock"):
            held.set()
            release.wait(20)
            time.sleep(0.3)
            done.add(pieces[0].name)

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "collect", lambda piece: done.add(piece.name))
    monkeypatch.setattr(run, "is_done", lambda piece: piece.name in done)
    monkeypatch.setattr(run, "idle_minutes", lambda piece, speeds: 1.0)
    run.RUNS.mkdir(parents=True)
    held, release = threading.Event(), threading.Event()
    other = threading.Thread(target=first_process, daemon=True)
    other.start()
    held.wait()
    run.run(planned, None, said.append)
    other.join()
    assert order == [pieces[1].name, pieces[2].name]
    assert said == [f"{pieces[0].name}: waits for the process that has it"]
    done.clear()
    run.run(planned, 0.001, said.append)
    assert "would take" in said[-1]


def test_claims_compare_equal_seeds_and_share_pieces_with_the_chain() -> None:
    rates = Rates({"b": 1e-3})
    found = arms(rates)
    for claim in found.values():
        for arm in claim:
            seeds = AGAIN.seeds if claim is found["o"] else MORE_SEEDS
            assert [piece.seed for piece in arm.pieces] == list(seeds)[: len(arm.pieces)]
            assert all(one.seed == piece.seed for piece in arm.pieces for one in piece.chain)
    assert {len(arm.pieces) for arm in found["k"]} == {len(MORE_SEEDS)}
    assert {len(arm.pieces) for arm in found["o"]} == {8}
    assert [(arm.name, arm.pieces[0].lr) for arm in found["o"]] == [(arm.name, arm.pieces[0].lr) for arm in found["n"]]
    # The baselines with which claims compare: `run --claim` trains them too, with all seeds.
    for letter, models, epochs in (("a", "abcd", 40), ("b", "d", 40), ("e", "b", 80), ("i", "bcd", 40)):
        own = set(pieces_of([found[letter]]))
        assert {rates.baseline(model, epochs, seed) for model in models for seed in SEEDS} <= own
    small = set(pieces_of([found["k"]]))
    assert {rates.baseline(model, 320, seed, 1) for model in "abcd" for seed in MORE_SEEDS} <= small
    both, weights, features, neither, longer = (arm.pieces[1] for arm in found["f"])
    assert {piece.epochs for piece in (both, weights, features, neither)} == {20}
    assert longer == replace(neither, epochs=EQUAL_PAIR)
    assert (weights.alpha, weights.expanded, weights.lr) == (0.0, True, both.lr)
    assert (features.alpha, features.expanded, features.lr, features.warmup) == (None, False, 1e-3, neither.warmup)
    assert both == found["g"][1].pieces[1] == found["h"][0].pieces[1]
    assert both in family_arms(rates, design=CHAINS[3])[1].pieces
    assert {arm.pieces[0].epochs for arm in found["b"][:3]} == {7}
    assert [arm.pieces[0].epochs for arm in found["e"]] == [5, 20, 10, 40, 20, 80]
    assert [len(arm.pieces[0].chain) for arm in found["b"][:3]] == [2, 3, 4]


def test_families_of_other_sizes_have_equal_ratios(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for count, low, high, last in ((3, 5.5, 6.5, 8), (4, 2.7, 3.7, 7), (7, 1.6, 2.05, 5)):
        macs = [macs_of(Piece(model, 1)) for model in families()[count]]
        assert all(low < large / small < high for small, large in itertools.pairwise(macs))
        chain = family_arms(Rates(), families()[count], FIRST._replace(shares=shares_of(count)))[-1].pieces[0].chain
        assert (len(chain), chain[1].epochs, chain[-1].epochs) == (count, 10, last)


def test_equal_compute_is_that_of_the_whole_chain(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    chain = family_arms(Rates())[-1].pieces[0].chain
    assert macs_of(Piece("d", EQUAL_MACS)) == pytest.approx(sum(map(macs_of, chain)), rel=0.01)
    members = {one for arm in classical(Rates()) for one in arm.pieces[0].chain}
    assert sorted(one.model for one in members) == [*MEMBERS]
    assert not any(one.expanded for one in members if one.teacher)
    assert sum(map(macs_of, members)) == pytest.approx(sum(map(macs_of, chain)), rel=0.01)
    pair = family_arms(Rates(), design=CHAINS[3])[1].pieces[0].chain
    assert macs_of(Piece("b", EQUAL_PAIR)) == pytest.approx(sum(map(macs_of, pair)), rel=0.01)
    seconds = Study().seconds
    own = sum(
        seconds({"model": one.model, "teacher": one.teacher and one.teacher.name, "alpha": 1, "steps": one.epochs}) or 0
        for one in chain
    )
    assert seconds({"model": "d", "teacher": None, "steps": EQUAL_TIME}) == pytest.approx(own, rel=0.01)


def test_a_link_without_distillation_costs_no_teacher(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    first = Piece("a", 80)
    assert macs_of(Piece("b", 20, 0, first, alpha=0.0)) == macs_of(Piece("b", 20)) < macs_of(Piece("b", 20, 0, first))


def test_a_piece_waits_for_its_teacher_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process trains the teacher again: the next piece is taken first."""
    monkeypatch.chdir(tmp_path)
    teacher = Piece("a", 5)
    planned = [Piece("b", 1, 0, teacher), Piece("b", 2)]
    order: list[str] = []
    said: list[str] = []

    def other_process() -> None:
        with FileLock(run.RUNS / f"{teacher.name}.lock"):
            held.set()
            for _ in range(2000):
                if order == [planned[1].name]:
                    break
                time.sleep(0.01)
            time.sleep(0.3)
            teacher.model_folder(run.RUNS).mkdir(parents=True)

    def app(words: list[str], standalone_mode: bool) -> None:
        order.append(Path(words[1]).stem)

    monkeypatch.setattr(run, "app", app)
    monkeypatch.setattr(Piece, "recipe", lambda piece, runs: load_recipe(root_recipe, []))
    monkeypatch.setattr(run, "collect", lambda piece: None)
    monkeypatch.setattr(run, "is_done", lambda piece: piece.name in order)
    monkeypatch.setattr(run, "idle_minutes", lambda piece, speeds: 1.0)
    root_recipe = Path(__file__).parents[3] / "benchmarks" / "evidence" / "icons.yaml"
    run.RUNS.mkdir(parents=True)
    held = threading.Event()
    other = threading.Thread(target=other_process, daemon=True)
    other.start()
    held.wait()
    run.run(lambda: planned, None, said.append)
    other.join()
    assert order == [planned[1].name, planned[0].name]
    assert said == ["a-e5-s0: waits for the process that has it"]


# Statistics


def test_the_quantile_is_that_of_student_s_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 1.5, 2, 3.7, 10, 200, 50_000):
        assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


def test_one_image_a_concept_and_one_seed_is_the_paired_t_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    own, other = random.random((2, 1, 400)) < 0.5
    found = difference(own, other, np.arange(400))
    gains = own[0].astype(float) - other[0]
    low, high = stats.t.interval(0.95, 399, gains.mean(), stats.sem(gains))
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high), rel=1e-4)


def test_intervals_cover_the_truth_in_a_simulation() -> None:
    """Concepts and seeds shift the accuracy: intervals over images alone would miss the truth far more often."""
    random = np.random.default_rng(1)
    concepts = np.repeat(np.arange(150), 6)
    hits = naive = 0
    for _ in range(400):
        of_concept = random.normal(0, 0.15, 150)[concepts]
        of_seed = random.normal(0, 0.02, (3, 1))
        own = random.random((3, 900)) < np.clip(0.5 + of_concept + of_seed, 0, 1)
        other = random.random((3, 900)) < 0.5
        found = difference(own, other, concepts)
        hits += found.low <= 0 <= found.high
        images = (own.mean(axis=0) - other.mean(axis=0)).std() / 30 * 196
        naive += abs(found.mean) <= images
    assert hits / 400 >= 0.93
    assert naive / 400 < 0.85


def test_what_seeds_and_concepts_share_counts_once() -> None:
    """Means over seeds and concepts that differ in the pairs of them alone: both variances hold all of it."""
    random = np.random.default_rng(2)
    means, widths = [], []
    for _ in range(300):
        of_pair = np.repeat(random.normal(0, 0.3, (4, 200)), 2, axis=1)
        found = difference(of_pair, np.zeros((4, 400)), np.repeat(np.arange(200), 2))
        means.append(found.mean)
        widths.append(found.half_width)
    # Against a normal's interval of the true spread. Counted twice, it would be more than 1.5 times as wide.
    assert 1 < float(np.mean(widths)) / (1.96 * float(np.std(means))) < 1.4


def test_simulated_studies_find_what_is_there() -> None:
    even, far = (simulated(truth, 3, 0.2, studies=40) for truth in (0.0, -6.0))
    assert float(even[3]) > 0.85
    assert float(far[3]) > 0.85
    assert [float(share) for share in far[5:]] == [0, 1]
    assert float(even[5]) > 0.2
    assert float(even[6]) < 0.1


def test_a_length_of_equal_accuracy_is_between_those_measured() -> None:
    right = {share: np.arange(400) % 100 < share for share in (10, 20, 30, 40)}
    concepts = np.arange(400) // 4
    lengths, baselines = (10, 20, 40), [right[10], right[20], right[40]]
    found = equal_length(right[30], lengths, baselines, concepts)
    assert found is not None
    assert found.epochs == pytest.approx(20 * 2**0.5)
    assert found.low is not None
    assert found.low < found.epochs
    assert found.high is None or found.high > found.epochs
    assert equal_length(right[20], lengths, baselines, concepts).epochs == pytest.approx(20)  # type: ignore[union-attr]
    assert equal_length(right[40] | right[30], lengths, baselines[:2], concepts) is None, "above all"
    assert equal_length(right[10] & False, lengths, baselines, concepts) is None, "below the shortest"
    # As accurate as the longest, on other images: in half of all draws it is better.
    assert equal_length(np.roll(right[40], 50), lengths, baselines, concepts).high is None  # type: ignore[union-attr]


def test_a_verdict_is_that_of_the_margin() -> None:
    same = np.zeros((2, 4))
    assert difference(same, same, range(4)).verdict == "lossless"
    assert difference(same, same + 1, range(4)).verdict == "not lossless"
    assert difference(same[:1], same[:1], range(4)).verdict == "undecided", "one seed"
    wide = np.array([[1, 1, 0, 1], [1, 1, 0, 1]]), np.array([[0, 0, 0, 1], [0, 0, 0, 1]])
    assert difference(*wide, range(4)).half_width > MARGIN
    assert difference(*wide, range(4)).verdict == "undecided"
    assert MARGIN == 1.0
    with pytest.raises(ValueError, match="gains of shape"):
        difference(same, same, range(5))


# Results


def finished(runs: Path, piece: Piece, top1: float, labels: list[int]) -> None:
    """What a run leaves of a piece, with `top1` percent of 100 images correct."""
    place = runs / piece.name / "jobs" / f"1-{piece.model}"
    (place / "scores").mkdir(parents=True)
    arrays = {"ids": np.arange(100), "labels": np.array(labels), "correct": np.arange(100) < top1}
    names = (SELECT, REPORT, UNSEEN, RETRIEVAL)
    for name in names:
        np.savez(place / "scores" / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    manifest = {
        **dict.fromkeys(("hash", "result"), ""),
        "state": "done",
        "alpha": 500.0 if piece.teacher else 0.0,
        "parameters": 9,
        "steps": 10,
        "cost": {"total_macs": 1e12 * piece.epochs},
        "trained": {"device_hours": 0.1},
        "validation_loss": 1.0,
        "scores": {name: {"top1": top1, "image_to_text_r1": top1, "n": 100} for name in names},
        "starts": [{"machine": {"device": "a CPU", "torch": "2"}}],
        "started": "then",
        "finished": "now",
    }
    write_json(place / "manifest.json", manifest)
    if piece.teacher:
        lines = [{"kind": "train", "step": step, "r": step / 100} for step in (1, 3)]
        (place / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"kind": "eval", "step": 3}']))
    write_json(runs / piece.name / "run.json", {"data_fingerprint": "f"})


def test_seeds_that_are_judged_alone_have_rows_of_their_own(tmp_path: Path) -> None:
    runs, raw = tmp_path / "runs", tmp_path / "raw"
    for seed in (0, 6):
        teacher = Piece("a", 20, seed)
        for piece in (teacher, Piece("b", 20, seed), Piece("b", 5, seed, teacher)):
            finished(runs, piece, 10, [*range(50), *range(50)])
            run.collect(piece, runs, raw)
    study = Study(raw)
    for table in (report.baseline_table(study), report.link_table(study)):
        place = table.header.index("seeds")
        seeds = [row[place] for row in table.rows]
        assert seeds == ["1", "1 (6)"] * (len(seeds) // 2)


def test_results_are_collected_and_reported(tmp_path: Path) -> None:
    runs, raw = tmp_path / "runs", tmp_path / "raw"
    teacher = Piece("a", 20)
    done = [*(Piece("b", epochs) for epochs in LENGTHS[:3]), teacher, Piece("b", 5, 0, teacher)]
    for piece, top1 in zip(done, (10, 30, 30.5, 20, 33), strict=True):
        finished(runs, piece, top1, [*range(50), *range(50)])
        run.collect(piece, runs, raw)
        assert run.is_done(piece, raw)
    study = Study(raw)
    (only,) = study.links()
    assert (only[0]["r"], only[0]["expanded"]) == (0.02, True)
    found = study.compare(only, study.baselines("b", 20))
    assert found is not None
    assert found.mean == pytest.approx(3.0)
    assert study.equal(only) is None, "no baseline is as accurate"
    report.write_report(tmp_path, raw)
    assert report.changed(tmp_path, raw) == []
    text = (tmp_path / "tables.md").read_text()
    assert "a(40) → b(10)" in text
    path = raw / f"{teacher.name}.json"
    values: dict[str, Any] = json.loads(path.read_text())
    values["scores"][REPORT]["top1"] = 21.0
    write_json(path, values)
    assert report.changed(tmp_path, raw) == ["tables.md", "family.svg", "lengths.svg"]
    finished(runs, Piece("a", 40), 20, [*range(100)])
    with pytest.raises(RunError, match="has other images than the pieces before"):
        run.collect(Piece("a", 40), runs, raw)


TINY = """
name: tiny
data: {train: "data/train/*.tar", images: 96, captions: 2}
family:
  common: {head_width: 16, text_head_width: 16}
  members: [{name: a, preset: vit_pico}, {name: b, preset: vit_nano, depth: 2, text_depth: 1}]
chain: {links: [{model: a, train: {epochs: 1}, warmup: {steps: 1}}]}
optimizer: {batch: 32, precision: fp32}
engine: {device: cpu, workers: 0}
evaluation:
  validation: "data/train/*.tar"
  primary: test_style
  sets: [{name: val_style, data: "data/test/*.tar"}, {name: test_style, data: "data/test/*.tar"}]
"""


def test_a_link_may_start_from_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of almost 0 a model stays what it was."""
    make_shards(tmp_path / "data" / "train", 96, 2, size=(32, 32))
    make_shards(tmp_path / "data" / "test", 24, 1, classes=4, size=(32, 32))
    (tmp_path / "data" / "test" / "classnames.txt").write_text("cat\ndog\nhouse\ntree\n")
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pieces_module, "RECIPE", Path("tiny.yaml"))
    teacher = Piece("a", 1, warmup=1)
    random = Piece("b", 1, 0, teacher, 1e-30, 1, expanded=False)
    for piece in (teacher, random):
        run.train(piece)
        run.collect(piece)
    run.train(random)  # it is finished: nothing happens
    trained = read_artefact(random.model_folder(run.RUNS))
    drawn = DrawnState(build(trained.spec, device="meta"), trained.spec, 0)
    key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert (trained.state[key] - drawn[key]).abs().max() < 1e-6
    found = {item["piece"]: item for item in run.read_raw()[0]}
    assert found[random.name]["r"] > 0
    assert (found[random.name]["expanded"], found[teacher.name]["r"]) == (False, None)
    before = (run.RAW / f"{random.name}.npz").read_bytes()
    (run.RAW / f"{random.name}.json").unlink()
    run.collect_again([teacher, random, Piece("b", 2)], lambda text: None)
    assert {item["piece"]: item for item in run.read_raw()[0]}.keys() == found.keys()
    assert (run.RAW / f"{random.name}.npz").read_bytes() == before


def test_the_committed_report_is_that_of_the_raw_results(root: Path) -> None:
    if not (root / run.RAW).exists():
        pytest.skip("no piece has been measured yet")
    optional("matplotlib", "dev")
    assert report.changed(root / report.OUT, root / run.RAW) == []
    found = {(values["shards"], values["data_fingerprint"]) for values in Study(root / run.RAW).all}
    assert (ALL, FINGERPRINT) in found
    assert len(found) == len({shards for shards, _ in found}), "the same shards are the same data"
