"""One rank of a link of 184 million parameters, or of a control; run under a memory limit.

Prints the anonymous memory of the process as JSON: at first, and at most in each link.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.handoff.process import Memory, status
from compt.chain.job import JobRun
from compt.chain.run import only, prepare, run_only
from compt.dist import collectives as dist
from compt.recipe.schema import Recipe
from tests.helpers.recipe import recipe_of

LINKS = ("1-vit_184m", "2-vit_197m")
SIZES = "preset: vit_l16, embed_dim: 64, text_width: 128, text_heads: 2, text_depth: 1"
STEPS = "train: {steps: 2}, warmup: {steps: 1}"

CHANGES = (
    "data.images=12",
    "data.captions=1",
    "family.common={context_length: 8, patch_size: 16, image_size: 32}",
    f"family.members=[{{name: vit_184m, depth: 14, {SIZES}}}, {{name: vit_197m, depth: 15, {SIZES}}}]",
    f"chain.links=[{{model: vit_184m, {STEPS}}}, {{model: vit_197m, {STEPS}}}]",
    "baselines=",
    "optimizer.batch=2",
    "engine.name=fsdp2",
    "evaluation.sets=[]",
    "evaluation.primary=",
)


def recipe(action: str) -> Recipe:
    """That of an action: nothing is scored, but in the control after the first step."""
    scoring = ("evaluation.every={steps: 1}",) if action == "look_on" else ("evaluation.validation=[]",)
    return recipe_of(*CHANGES, *scoring)


def main() -> None:
    """ACTION BASE: `chain` trains the first link of a chain to its end and begins the second.

    `look_on`, the control, is the first link with an evaluation during training, for which each rank gathers the model.
    """
    action, base = sys.argv[1], Path(sys.argv[2])
    dist.init("cpu", timeout_seconds=300)
    before = status()["RssAnon"]
    peaks = [peak(action, base, name) for name in LINKS[: 1 if action == "look_on" else 2]]
    print(json.dumps({"before": before, "peaks": peaks}))
    dist.barrier()
    dist.shutdown()


def peak(action: str, base: Path, name: str) -> int:
    """The most that a rank holds while it trains the first link or begins the second."""
    memory = Memory()
    memory.start()
    context, plan = prepare(recipe(action), base / action, base=base, names=[name])
    jobs = only(plan, [name], context.folder)
    if name == LINKS[1]:
        JobRun(jobs[0], context, lambda _: None)._begin()
    else:
        run_only(context, plan, jobs, lambda _: None)
    memory.ended.set()
    memory.join()
    return memory.peak


if __name__ == "__main__":
    main()
