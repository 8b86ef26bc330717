"""Plan a chain, train it, grow its last model once more, and score both: a minute on two cores.

Run `compt data emoji` first: it writes 6,883 small images with captions, from the sample that comes with compt.
"""

import compt

short = [f"chain.links.{n}.{key}={{steps: {steps}}}" for n in range(3) for key, steps in (("train", 54), ("warmup", 5))]

plan = compt.plan_chain("demo", overrides=short)
for job in plan.links:
    print(f"{job.name}: {job.steps} steps, {job.cost.total_macs:.2e} MACs")

chain = compt.Chain("demo", overrides=short)
summary = chain.run("runs/short", say=print)
for row in summary.links:
    print(f"{row.job}: {row.top1:.2f} % of {row.images} images, 95 % interval {row.low:.2f} to {row.high:.2f}")

model, preprocess, tokenizer = compt.load_model("runs/short/jobs/3-vit_mini")
larger = compt.expand_model(model, "vit_midi", operator="net2net")
sets = [
    {"name": "new_style", "data": "data/emoji/test_style/*.tar"},
    {"name": "pairs", "task": "retrieval", "data": "data/emoji/test_style/*.tar"},
]
for name, scored in {"vit_mini": model, "vit_midi, expanded": larger}.items():
    for key, result in compt.evaluate_model(scored, sets).items():
        print(name, key, result.headline())
