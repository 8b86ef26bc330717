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
        (
            {"compile": True, "compile_mode": "max-autotune", "text": "packed"},
            "captures graphs of towers only; write max-autotune-no-cudagraphs or default",
        ),
        *(
            (
                {"compile": "towers", "compile_mode": "reduce-overhead", **text},
                "'reduce-overhead' captures CUDA graphs, which needs the few sizes of text: packed; or write max-auto",
            )
            for text in ({}, {"text": "padded"}, {"text_buckets": 2})
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**given)


@pytest.mark.parametrize("on", [True, "on"])
def test_a_recipe_asks_for_graphs(on: Any) -> None:
    config = EngineConfig(graphs=on, text="packed", compile="towers", loss_chunk=8)
    assert config.graphs == "on"
    assert EngineConfig().graphs == EngineConfig(graphs=False).graphs == "off"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "graphs: on captures CUDA graphs, which needs the few sizes of text: packed; or write graphs: off"),
        ({"text": "buckets"}, "needs the few sizes of text: packed"),
        *(
            ({"text": "packed", **more}, "does not work with micro-batches, recompute or tune; write graphs: off")
            for more in ({"micro_batch": 2}, {"find_micro_batch": True}, {"recompute": True}, {"tune": True})
        ),
        *(
            ({"text": "packed", "name": name}, f"graphs: '{name}' communicates within a step; write name: ddp")
            for name in ("fsdp2", "zero0", "zero3")
        ),
        ({"text": "packed", "shard_teacher": True}, "graphs: a sharded teacher communicates within a step"),
        ({"text": "packed", "teacher_cache": 10**6}, "graphs: teacher_cache looks captions up on the CPU"),
        (
            {"text": "packed", "compile": "towers", "compile_mode": "max-autotune"},
            "graphs: compile_mode 'max-autotune' captures graphs too; leave one out",
        ),
        ({"graphs": "auto"}, "should be 'off' or 'on'"),
    ],
)
def test_what_cannot_be_captured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**{"graphs": "on", **given})


def test_a_link_with_another_engine_captures_nothing() -> None:
    common = EngineConfig(graphs="on", text="packed")
    with pytest.raises(ValueError, match="communicates within a step"):
        changed_engine(common, {"name": "fsdp2"})
    assert changed_engine(common, {"name": "fsdp2", "graphs": False}).graphs == "off"


def test_a_cpu_compiles_without_graphs() -> None:
    for mode, plain in (("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
        config = EngineConfig(compile="towers", compile_mode=mode, text="packed")  # type: ignore[arg-type]
        assert config.on("cuda").compile_mode == mode
        assert config.on("cpu").compile_mode == plain
