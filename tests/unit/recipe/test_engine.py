"""What the section `engine` means for the text of a step."""

from __future__ import annotations

from typing import Any

import pytest

from compt.models.presets import PACKED
from compt.recipe.engine import EngineConfig, changed_engine


@pytest.mark.parametrize(
    ("given", "buckets"),
    [
        ({}, 4),
        ({"text": "auto"}, 4),
        ({"text": "packed"}, PACKED),
        ({"text": "padded"}, 1),
        ({"text": "buckets"}, 4),
        ({"text": "buckets", "text_buckets": 3}, 3),
        ({"text_buckets": 3}, 3),
        ({"text_buckets": 1}, 1),
        ({"text": "packed", "text_buckets": 3}, PACKED),
    ],
)
def test_how_a_recipe_computes_text(given: dict[str, Any], buckets: int) -> None:
    config = EngineConfig(**given)
    assert config.on("cuda").buckets == config.buckets == buckets
    assert config.on("cpu").buckets == (
        buckets if given.get("text", "auto") != "auto" or "text_buckets" in given else PACKED
    )


def test_a_link_computes_text_in_its_own_way() -> None:
    assert changed_engine(EngineConfig(text_buckets=3), {"text": "packed"}).buckets == PACKED


@pytest.mark.parametrize(
    ("given", "way"), [({}, "off"), (False, "off"), (True, "blocks"), ("blocks", "blocks"), ("towers", "towers")]
)
def test_older_recipes_say_true_or_false_for_what_is_compiled(given: Any, way: str) -> None:
    assert EngineConfig(**({"compile": given} if given != {} else {})).compile == way


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"compile": "all"}, "should be 'off', 'blocks' or 'towers'"),
        (
            {"compile": "towers", "name": "fsdp2"},
            "fsdp2 gathers weights block by block; write blocks",
        ),
        (
            {"compile": "towers", "name": "zero3"},
            "zero3 gathers weights block by block; write blocks",
        ),
        ({"compile_mode": "max-autotune"}, "needs compile: blocks or towers"),
        (
            {"compile": True, "compile_mode": "reduce-overhead", "micro_batch": 2},
            "does not work with micro-batches, recompute or tune",
        ),
        (
            {"compile": True, "compile_mode": "max-autotune", "recompute": True},
            "write max-autotune-no-cudagraphs or default",
        ),
        ({"compile": True, "compile_mode": "max-autotune", "tune": True}, "recompute or tune"),
    ],
)
def test_what_cannot_be_compiled_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**given)
