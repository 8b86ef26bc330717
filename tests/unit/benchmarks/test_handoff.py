"""The measurement of the hand-off: what it reports, and that its memory limit works."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.handoff import study as handoff
from benchmarks.handoff.run import Pair, Random, check_space, limited, model_bytes
from benchmarks.handoff.study import MEMORY, PAIRS, STREAM, findings, record, table
from compt.cost import counts
from compt.errors import RunError

PAIR = PAIRS["vit_2b"]


def run(way: str, writers: int, codes: list[int], kills: int = 0) -> dict[str, Any]:
    """What a measurement reports, with made-up figures."""
    ranks = [
        {
            "rank": rank,
            "threads": 1,
            "seconds": 10.0 + rank,
            "bytes_read": 2 * 10**9,
            "bytes_written": 10**9,
            "peak_extra": (5 + rank) * 10**8,
            "peak_resident": 10**9,
            "anonymous_before": 10**8,
        }
        for rank in range(writers)
    ]
    return {
        "way": way,
        "writers": writers,
        "limit": PAIR.limit,
        "limited_by": "a wall",
        "exit_codes": codes,
        "killed": -9 in codes,
        "out_of_memory_kills": kills,
        "errors": [f"{code}: died" for code in codes if code],
        "group_peaks": [7, None][:writers],
        "ranks": [rank if code == 0 else {} for rank, code in zip(ranks, codes, strict=True)],
        "hash": "same",
    }


def test_the_large_student_has_two_billion_parameters() -> None:
    assert 2e9 < counts.parameters(PAIR.student) < 2.1e9
    assert 0.45 < counts.parameters(PAIR.teacher) / counts.parameters(PAIR.student) < 0.55
    assert model_bytes(PAIR.student) == 4 * counts.parameters(PAIR.student)
    assert PAIR.limit is not None
    assert PAIR.limit < PAIR.both_bytes / 2


def test_the_report() -> None:
    rows = [record(PAIR, run(STREAM, 2, [0, 0])), record(PAIR, run(MEMORY, 1, [-9], kills=1))]
    assert (rows[0]["seconds"], rows[0]["bytes_read"], rows[0]["peak_extra_bytes"]) == (11.0, 4 * 10**9, 6 * 10**8)
    assert rows[0]["peak_extra_of_largest"] == pytest.approx(6e8 / (4 * 49_408 * 1280))
    assert rows[1]["seconds"] is None
    shown = table(rows).rows
    assert [row[-1] for row in shown] == ["done", "killed: out of memory"]
    (said,) = findings([PAIR], rows)
    assert "2.4 times the largest parameter and 5% of the two models" in said
    assert "wrote the same bytes" in said
    assert "a program that loads both is killed" in said

    other = record(PAIR, run(STREAM, 1, [0])) | {"hash": "other"}
    lived = record(PAIR, run(MEMORY, 1, [0]))
    (said,) = findings([PAIR], [*rows[:1], other, lived])
    assert "OTHER bytes" in said
    assert "is NOT killed" in said
    assert table([record(PAIR, run(STREAM, 2, [0, 1]))]).rows[0][-1] == "failed: 1: died"


def test_random_weights_do_not_depend_on_the_reading_order() -> None:
    spec = PAIRS["smoke"].teacher
    one, other = Random(spec), Random(spec)
    names = list(one)
    assert all(torch.equal(one[name], other[name]) for name in reversed(names))
    assert not torch.equal(one["visual.ln_post.weight"], one["visual.ln_post.bias"])


def test_a_disk_that_is_too_small_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, [PAIRS["smoke"]])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(RunError, match=r"1\.0 GB are free, the measurement needs 13\."):
        check_space(tmp_path, list(PAIRS.values()))


@pytest.mark.parametrize(("mebibytes", "lives"), [(20, True), (400, False)])
def test_the_memory_limit_holds(mebibytes: int, lives: bool) -> None:
    code = f"block = b'x' * ({mebibytes} << 20); print(len(block))"
    with limited(100 << 20) as limit:
        command = ["sh", "-c", f'{limit.commands} && exec "$@"', "sh", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        kills, peak = limit.kills(), limit.peak()
    if lives:
        assert done.stdout.strip() == str(mebibytes << 20), done.stderr
        assert kills == 0
    elif limit.group is not None:
        assert done.returncode == -signal.SIGKILL
        assert kills > 0
        assert peak is not None
        assert peak > 90 << 20
    else:
        assert "MemoryError" in done.stderr
    assert limit.group is None or not limit.group.exists()


@pytest.mark.full
def test_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(PAIRS["smoke"].teacher, PAIRS["smoke"].student, limit_share=None, load=True)
    monkeypatch.setitem(handoff.PAIRS, "smoke", pair)
    (tmp_path / "room").mkdir()
    handoff.main(["--pairs", "smoke", "--out", str(tmp_path), "--temporary", str(tmp_path / "room")])
    result = json.loads((tmp_path / "handoff" / "result.json").read_text())
    assert [(row["way"], row["writers"], row["exit_codes"]) for row in result["runs"]] == [
        (STREAM, 1, [0]),
        (STREAM, 2, [0, 0]),
        (MEMORY, 1, [0]),
    ]
    one, two, _ = result["runs"]
    assert one["hash"] == two["hash"]
    assert one["bytes_written"] > model_bytes(pair.student)
    assert one["bytes_read"] > model_bytes(pair.teacher) + model_bytes(pair.student)
    assert "wrote the same bytes" in result["findings"][0]
    assert list((tmp_path / "room").iterdir()) == []
