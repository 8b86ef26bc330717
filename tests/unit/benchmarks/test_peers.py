"""The training step beside its peers: all sides compute the same, and a side that does not is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.peers import sides, study
from benchmarks.peers.sides import PEERS, Captions, Case
from benchmarks.peers.study import compare, engine_of
from compt.errors import ConfigError, RunError
from compt.models.presets import resolve

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"image_size": 16, "text_depth": 2, "depth": 2, "context_length": 12, "vocab_size": 64}
STUDENT = resolve("vit_nano", {**SMALL, "embed_dim": 32})
LINK = Case(
    STUDENT,
    resolve("vit_pico", {**SMALL, "embed_dim": 32}),
    Captions("three", 3, 12, (1.6, 0.4)),
    batch=6,
    precision="fp32",
)


def test_a_link_is_the_same_for_all_sides() -> None:
    rows = compare(LINK, CPU, ["text=packed", "text=buckets"], 1, list(PEERS))
    assert [row["side"] for row in rows] == ["compt, text=packed", "compt, text=buckets", *PEERS]
    assert rows[0]["ratios"] == [1.0]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6) for row in rows)
    # Packed text computes the tokens that the MFU of every side counts, so the ratio of speeds is that of MFUs.
    for row in rows:
        assert row["flops_per_second"] * row["seconds"][0] == pytest.approx(
            rows[0]["flops_per_second"] * rows[0]["seconds"][0]
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_alone_in_half_precision(precision: Any) -> None:
    case = replace(LINK, teacher=None, precision=precision, captions=Captions("one", 1, 12, None))
    rows = compare(case, CPU, ["text=packed"], 1, ["OpenCLIP", "authors' settings"])
    assert len({row["loss"] for row in rows}) > 1


@pytest.mark.parametrize("part", ["distance", "_paper_loss", "stock_optimizer"])
def test_a_side_that_computes_otherwise_is_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(sides, part)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if part != "stock_optimizer":
            return 1.01 * found
        found.param_groups[1]["lr"] *= 0.5
        return found

    monkeypatch.setattr(sides, part, wrong)
    step = 2 if part == "stock_optimizer" else 1
    with pytest.raises(RunError, match=f"the loss of step {step} is .* with compt, text=packed and .* with authors'"):
        compare(LINK, CPU, ["text=packed"], 1, ["authors' settings"])


def test_settings_that_no_engine_has() -> None:
    assert engine_of("text=packed,compile=true").compile
    with pytest.raises(ConfigError, match="--ways txt=packed: "):
        engine_of("txt=packed")


def test_the_captions_of_an_image() -> None:
    full, several = (study.CAPTIONS[kind].tokens(4, 64) for kind in ("full", "dreamlip"))
    assert full.shape == (4, 1, 32)
    assert several.shape == (4, 4, 77)
    assert (full != 0).all()
    ends = several.argmax(-1)
    assert (several.gather(-1, ends[..., None]) == 63).all()
    assert (several.cumsum(-1).argmax(-1) == ends).all(), "nothing follows the end of text"
