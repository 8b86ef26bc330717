"""The advice when memory runs out, with the numbers of `compt plan`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compt.cost.gpus import DEVICES
from compt.cost.memory import Memory
from compt.plan import remedies as out_of_memory
from compt.plan.forecast import Machine, make_forecast, memory_of
from compt.plan.jobs import Job, make_plan
from compt.plan.remedies import Room, advice
from compt.recipe.engine import EngineConfig
from compt.recipe.read import load_recipe
from compt.recipe.schema import Recipe
from compt.text import count
from tests.helpers.recipe import recipe_of

GB = 10**9


def cc3m(*changes: str) -> Recipe:
    return load_recipe(Path(__file__).parents[3] / "recipes" / "cc3m_vit.yaml", list(changes))


def advised(recipe: Recipe, job: Job, world_size: int = 8, room: Room | None = None) -> dict[str, str]:
    """The bytes behind each change, "now" among them, and the texts of what is not counted."""
    engine = recipe.engine_of(job.spec.name)
    share = recipe.optimizer.batch // world_size
    text = advice(recipe, job, engine, world_size, room or Room(), engine.micro_batch or share)
    now = re.search(rf"counts (\S+ \S+) for each of {world_size} processes", text)
    assert now is not None
    changes = re.findall(r"^  (engine\.[^:]+: [^:(]+?)(?: \(now \w+\))?: (.+)$", text, re.MULTILINE)
    return {
        "now": now[1],
        **dict(changes),
        **dict.fromkeys(re.findall(r"^  (Not counted: .+)$", text, re.MULTILINE), ""),
    }


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("engine.shard_teacher=true",),
        ("engine.name=fsdp2",),
        ("engine.name=fsdp2", "engine.fsdp2.replicas=2"),
        ("engine.name=fsdp2", "engine.fsdp2.reshard_after_forward=false"),
        ("engine.name=zero2", "engine.recompute=true", "engine.micro_batch=8", "engine.loss_chunk=16"),
    ],
)
def test_the_bytes_are_those_of_the_plan(changes: tuple[str, ...]) -> None:
    recipe = cc3m(*changes)
    planned = make_forecast(recipe, Machine(DEVICES["a100-80"], 8)).estimates[-1]
    assert advised(recipe, planned.job)["now"] == f"{count(planned.needed_bytes)}B"


def test_each_change_has_the_bytes_of_the_recipe_with_it() -> None:
    recipe = cc3m()
    job = make_plan(recipe).jobs[-1]
    found = advised(recipe, job)
    kinds = {"recompute": "true", "name": "zero3", "shard_teacher": "true"}
    for key, value in kinds.items():
        changed = cc3m(f"engine.{key}={value}")
        config = changed.engine_of(job.spec.name)
        needed = memory_of(changed, job, config.name, 8, recompute=config.recompute).total_bytes
        text = found.get(f"engine.{key}: {value}")
        # Named if it needs a tenth less; a teacher in shards alone may not.
        whole = memory_of(recipe, job, "ddp", 8).total_bytes
        assert text == (f"{count(needed)}B" if needed <= 0.9 * whole else None)
    assert {"engine.recompute: true", "engine.name: zero3"} <= found.keys()


class Stub:
    """A planner with fixed numbers: 100 GB, and the GB that each change saves."""

    SAVED = {"recompute": 40, "fsdp2": 20, "zero3": 25, "shard_teacher": 15, "loss_chunk": 5}  # noqa: RUF012

    def __call__(self, recipe: Recipe, job: Job, engine: str, gpus: int, **options: Any) -> Memory:
        config: EngineConfig = options["config"]
        assert (engine, options["recompute"]) == (config.name, config.recompute)
        size = 100 - sum(
            self.SAVED[key] for key in ("recompute", "shard_teacher", "loss_chunk") if getattr(config, key)
        )
        size -= self.SAVED.get(engine, 0) + max(0, 12 - (config.micro_batch or 12)) / 2
        return Memory(size * GB, 0, 0, 0, 0, 0, 0)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "memory_of", Stub())


def large(*changes: str) -> tuple[Recipe, Job]:
    """The tiny recipe with 24 images a step, and its second link, which has a teacher."""
    recipe = recipe_of("optimizer.batch=24", *changes)
    return recipe, make_plan(recipe).jobs[1]


@pytest.mark.usefixtures("by_hand")
def test_what_saves_a_tenth_is_named() -> None:
    # A chunk saves 5 GB of 100, a micro-batch of one image 5.5.
    both = {"engine.name: fsdp2": "80.0 GB", "engine.name: zero3": "75.0 GB"}
    alike = {"now": "100 GB", "engine.recompute: true": "60.0 GB", **both}
    assert advised(*large(), world_size=2) == {**alike, "engine.shard_teacher: true": "85.0 GB"}
    # One process cannot share anything, and without distillation there is no teacher to share.
    assert advised(*large(), world_size=1) == {"now": "100 GB", "engine.recompute: true": "60.0 GB"}
    assert advised(*large("chain.links.1.alpha=0.0"), world_size=2) == alike


@pytest.mark.usefixtures("by_hand")
def test_what_is_there_already_or_cannot_be_had_is_not_named() -> None:
    found = advised(*large("engine.shard_teacher=true", "engine.async_checkpoints=true"), world_size=2)
    assert found == {"now": "85.0 GB", "engine.recompute: true": "45.0 GB", "engine.name: fsdp2": "65.0 GB"}
    # 80 GB less 5 % and 1 GB are 75 GB.
    room = Room(None, 80 * GB)
    found = advised(*large(), world_size=2, room=room)
    assert found == {"now": "100 GB", "engine.recompute: true": "60.0 GB", "engine.name: zero3": "75.0 GB"}


@pytest.mark.usefixtures("by_hand")
def test_all_together_is_counted_with_the_teacher_in_shards() -> None:
    recipe, job = large()
    text = advice(recipe, job, recipe.engine_of(job.spec.name), 2, Room(None, 20 * GB), 12)
    # 100 - recompute 40, fsdp2 20, shard_teacher 15, loss_chunk 5, micro_batch 5.5
    assert "and all together take 14.5 GB: take more GPUs" in text


# A step in one piece, and changes that a recipe refuses beside these settings.
REFUSED: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "towers": (("engine.compile=towers",), {"engine.name: fsdp2", "engine.name: zero3"}),
    "teacher cache": (("engine.teacher_cache=1G",), {"engine.shard_teacher: true"}),
    "towers with graphs": (
        ("engine.compile=towers", "engine.text=packed", "engine.compile_mode=reduce-overhead"),
        {"engine.recompute: true", "engine.name: fsdp2", "engine.name: zero3"},
    ),
    "graphs": (
        ("engine.graphs=on", "engine.text=packed"),
        {"engine.recompute: true", "engine.name: fsdp2", "engine.name: zero3", "engine.shard_teacher: true"},
    ),
}


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_recipe_refuses_is_not_named(case: str) -> None:
    changes, refused = REFUSED[case]
    plain, found = (
        {key for key in advised(*large(*asked), world_size=2) if not key.startswith("Not counted")}
        for asked in ((), changes)
    )
    assert plain - found == refused
    # And not counted among all together: a chunk of the loss saves 5 of the 100 GB.
    recipe, job = large(*changes)
    text = advice(recipe, job, recipe.engine_of(job.spec.name), 2, Room(None, 20 * GB), 12)
    least = {"towers": "34.5", "teacher cache": "29.5", "towers with graphs": "80.0", "graphs": "95.0"}[case]
    assert f"and all together take {least} GB: take more GPUs" in text


def test_what_the_numbers_leave_out_is_said() -> None:
    recipe, job = large("engine.name=fsdp2", "engine.fsdp2.cpu_offload=true")
    (left_out,) = [text for text in advised(recipe, job, world_size=2) if text.startswith("Not counted")]
    offload = "engine.fsdp2.cpu_offload, which takes weights, gradients and moments off the GPU"
    assert left_out == f"Not counted: {offload}"
    # A micro-batch that was searched is found by then.
    for changes in ((), ("engine.find_micro_batch=true",)):
        assert not [text for text in advised(*large(*changes), world_size=2) if text.startswith("Not counted")]
