"""Which process the others wait for: the time of steps and the wait for data, rank by rank."""

from __future__ import annotations

import torch

from compt.dist import collectives as dist


def straggler_report(seconds: float, waited: float, steps: int) -> dict[str, float]:
    """Of the `steps` since the last report: what one took on the slowest rank and on average, and the longest wait.

    `seconds` are those that this rank was at work by itself, `waited` those of them in which it waited for its data. As
    ranks wait for each other within a step too, a slow GPU shows less than slow data. One small collective, so all
    ranks call it. Seconds a step: step_seconds_max, step_seconds_mean and data_wait_max; slowest_rank. In one process
    nothing.
    """
    if dist.world_size() == 1:
        return {}
    rows = dist.gather(torch.tensor([[seconds, waited]], dtype=torch.float64)) / steps
    whole, data = rows[:, 0], rows[:, 1]
    return {
        "step_seconds_max": float(whole.max()),
        "step_seconds_mean": float(whole.mean()),
        "data_wait_max": float(data.max()),
        "slowest_rank": int(whole.argmax()),
    }
