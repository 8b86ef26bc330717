"""Time packed text against text buckets and stock open_clip on a CPU: `python -m benchmarks.text`.

One process, one thread, fp32. A round runs one training step of every way in turn; a ratio is the median over rounds of
two steps of the same round. It is of CPU time, which other programs on the machine change less than clock time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import open_clip.model
import torch
from torch import Tensor

from compt.bench.step import LEARNING_RATE
from compt.engines.base import AdamWSettings, adamw
from compt.engines.ddp import DataParallelEngine
from compt.models.clip import build, caption_lengths, padded_tokens
from compt.models.presets import PACKED, ModelSpec, resolve
from compt.text import TextTable, terminal
from compt.train.accumulate import cached_backward
from compt.train.losses import contrastive_loss
from compt.train.task import ClipTask

CONTEXT = 77
WAYS = {"packed": PACKED, "4 buckets": 4, "1 bucket": 1, "open_clip": None}
DATA = {"one caption, as in CC3M": (1, (2.45, 0.35)), "four captions, as in DreamLIP": (4, (3.1, 0.5))}
"""Captions of an image, and the mean and deviation of the logarithm of their tokens."""


def captions(count: int, each: int, logarithm: tuple[float, float], vocabulary: int) -> Tensor:
    """Tokens int64 [count, each, CONTEXT] of captions with log-normal lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(count, each, 1).log_normal_(*logarithm, generator=generator).round().clamp(4, CONTEXT).long()
    tokens = torch.randint(1, vocabulary - 2, (count, each, CONTEXT), generator=generator)
    places = torch.arange(CONTEXT)
    return tokens.masked_fill(places >= lengths, 0).masked_fill(places == lengths - 1, vocabulary - 1)


def own_step(spec: ModelSpec, buckets: int, images: Tensor, tokens: Tensor) -> Callable[[], None]:
    """A step of compt's trainer, without data loading."""
    task = ClipTask(build(spec, seed=0), text_buckets=buckets)
    engine = DataParallelEngine(task.module)
    lengths = caption_lengths(tokens)

    def step() -> None:
        cached_backward(task, engine, images, tokens, lengths=lengths)
        engine.step(LEARNING_RATE, 1.0)

    return step


def stock_step(spec: ModelSpec, images: Tensor, tokens: Tensor) -> Callable[[], None]:
    """A step of open_clip's model, with compt's loss for several captions, fused AdamW and clipping."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**spec.open_clip_config())
    optimizer = adamw(dict(model.named_parameters()), AdamWSettings())

    def step() -> None:
        text = model.encode_text(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
        contrastive_loss(model.encode_image(images), text, model.logit_scale.exp().reshape(1)).task.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_nano", "vit_micro", "vit_mini"])
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each way (default: 8)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    others = [way for way in WAYS if way != "packed"]
    for name in options.models:
        spec = resolve(name, {"context_length": CONTEXT})
        images = torch.randn(options.batch, 3, spec.image_size, spec.image_size)
        for title, (each, logarithm) in DATA.items():
            tokens = captions(options.batch, each, logarithm, spec.vocab_size)
            steps = {
                way: stock_step(spec, images, tokens) if buckets is None else own_step(spec, buckets, images, tokens)
                for way, buckets in WAYS.items()
            }
            seconds: dict[str, list[float]] = {way: [] for way in steps}
            for _ in range(options.rounds + 1):
                for way, step in steps.items():
                    started = time.process_time()
                    step()
                    seconds[way].append(time.process_time() - started)
            lengths = caption_lengths(tokens).flatten()
            counted = [f"{padded_tokens(lengths, n) / len(lengths):.1f}" for n in WAYS.values() if n is not None]
            packed = seconds["packed"][1:]  # the first step of each makes AdamW's moments
            ratios = [median(b / a for a, b in zip(packed, seconds[way][1:], strict=True)) for way in others]
            rows.append((name, title, " / ".join(counted), f"{median(packed):.3f} s", *(f"{r:.2f}" for r in ratios)))
    header = ("Model", "Captions", "Tokens: packed / 4 / 1", "Packed", *(f"{way} over it" for way in others))
    terminal().print(TextTable("CPU time of a training step", header, rows, (), left=2))


if __name__ == "__main__":
    main()
