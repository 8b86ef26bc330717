"""Run whole chains as on a cluster, stopped in every link: `compt launch torchrun … launchers/train.py`.

Only this check covers the process group with both gloo and NCCL, models built on the "meta" device, sharded teachers,
offloading, moving averages, checkpoints, evaluation and loaders.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.checks.finding import Finding, holds, largest
from benchmarks.gpu.worker import end_family, hold_family, send
from compt.chain.record import read_manifest
from compt.errors import Interrupted
from compt.train.metrics import FILE, read_metrics

ROOT = Path(__file__).resolve().parents[3]
MEMBERS = (
    "{name: small, preset: vit_pico, depth: 1, embed_dim: 32}",
    "{name: large, preset: vit_pico, depth: 2, embed_dim: 48}",
    "{name: larger, preset: vit_pico, depth: 2, width: 96, embed_dim: 64}",
)
JOBS = ("1-small", "2-large", "3-larger")
BATCH = 16
STEPS = 80
"""Of a link: on a GPU about a second."""
STOP = 3
"""Lines that a link adds to its log before the request to stop."""
HELD = 5.0
"""Longest pause of training until the request to stop arrives, in seconds. It usually takes 0.1 s."""
SECONDS: Mapping[str, float] = {"chain": 150.0, "chain_zero": 180.0}
"""Time limit of a check on a GPU, all its starts together. In the slower one, DeepSpeed compiles its optimizer."""
SPARE = 10.0
"""The part of it that is reserved to kill what still runs."""
ON_CPU = 1200.0
"""Time limit of all starts of a check on two slow cores."""
AGAIN = 2e-3
"""Tolerance on a GPU between a run with stops and one without: some kernels sum in a different order each time. Lost
moments make ten times this difference. On a CPU the runs are equal."""

ENGINES: Mapping[str, Sequence[str]] = {
    "chain": ("{name: ddp}", "{name: fsdp2, shard_teacher: true}", "{name: fsdp2, fsdp2: {cpu_offload: true}}"),
    "chain_zero": (
        "{name: zero2, deepspeed_config: %s/zero2_offload.json}",
        "{name: zero3, shard_teacher: true}",
        "{name: zero3, deepspeed_config: %s/zero3_offload.json}",
    ),
}
"""The engine of each link. `engine.async_checkpoints` is on except with ZeRO, which does not support it."""


def check_chain(name: str) -> Callable[[torch.device], list[Finding]]:
    """A chain that is stopped in every link ends like one that is not."""
    return lambda device: _chain(name, device)


def limit(name: str, device: torch.device) -> float:
    """Seconds after which a check kills its processes."""
    return SECONDS[name] - SPARE if device.type == "cuda" else ON_CPU


def _chain(name: str, device: torch.device) -> list[Finding]:
    until = time.monotonic() + limit(name, device)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = _command(_write(place, name, device.type), processes(device))
        whole, halves = place / "whole", place / "halves"
        findings = [_ended("a chain", start(words, whole, until), 0)]
        kept: dict[str, list[str]] = {}
        for job in JOBS:
            if findings[-1].passed:
                findings.append(_ended(f"{job} asked to stop", start(words, halves, until, job), Interrupted.exit_code))
            if findings[-1].passed:
                findings.append(holds(f"{job}: stopped as it trained", _trains(halves, job)))
            if findings[-1].passed:
                kept[job] = _lines(halves, job)[:STOP]
        if findings[-1].passed:
            findings.append(_ended("the rest", start(words, halves, until), 0))
        if findings[-1].passed:
            most = AGAIN if device.type == "cuda" else 0.0
            findings += [finding for job in JOBS for finding in _compare(whole, halves, job, kept[job], most)]
        return findings


def _trains(run: Path, job: str) -> bool:
    """Whether a job is still training. If not, the request to stop came too late and stopped another job."""
    state = read_manifest(run / "jobs" / job)["state"]
    return bool(state == "training" and STOP <= _steps(run, job) < STEPS)


def processes(device: torch.device) -> int:
    """The number of processes: one per GPU, rounded down to a power of two, at most 16; two on a CPU."""
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    return max(n for n in (1, 2, 4, 8, 16) if n <= count)


def _write(place: Path, name: str, device: str) -> Path:
    from tests.helpers.recipe import make_data, write_recipe

    make_data(place)
    links = [
        f"{{model: {job.partition('-')[2]}, train: {{steps: {STEPS}}}, warmup: {{steps: 10}}, engine: {engine}}}"
        for job, engine in zip(JOBS, ENGINES[name], strict=True)
    ]
    changes = [
        f"family.members=[{', '.join(MEMBERS)}]",
        f"chain.links=[{', '.join(links)}]".replace("%s", str(ROOT / "ds_configs")),
        "optimizer.ema={decay: 0.9}",
        "optimizer.clip_grad_norm=1.0",
        f"optimizer.batch={BATCH}",
        f"engine.device={device}",
        f"engine.async_checkpoints={str(name == 'chain').lower()}",
        "engine.text_buckets=2",
        "engine.workers=1",
        "engine.timeout=60",
        "engine.checkpoint_every={steps: 50}",
        "evaluation.every={steps: 40}",
    ]
    recipe = place / "recipe.yaml"
    write_recipe(recipe, *changes)
    return recipe


def _command(recipe: Path, count: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    script = [str(ROOT / "launchers" / "train.py"), "--recipe", str(recipe), "--run-folder"]
    return [sys.executable, "-m", "compt", "launch", sys.executable, *launcher, *script]


def _log(run: Path, job: str) -> Path:
    return run / "jobs" / job / FILE


def _lines(run: Path, job: str) -> list[str]:
    return _log(run, job).read_text(encoding="utf-8").splitlines()


def _steps(run: Path, job: str) -> int:
    return len(read_metrics(_log(run, job), "train"))


def start(words: Sequence[str], run: Path, until: float, stopped: str | None = None) -> int:
    """Run a command for the folder `run`, stop the job `stopped` after `STOP` more steps, and return the exit code.

    Kills the command and its descendants if they still run at `until` on the monotonic clock.
    """
    known = _steps(run, stopped) if stopped else 0
    # Packages may have come by PYTHONPATH, too.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen([*words, str(run)], cwd=run.parent, env={**os.environ, "PYTHONPATH": paths})
    try:
        while stopped and process.poll() is None and time.monotonic() < until:
            if _steps(run, stopped) >= known + STOP:
                _ask_to_stop(process)
                break
            time.sleep(0.02)
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        if process.poll() is None:
            end_family(process.pid)
        process.wait()


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a launcher to stop its processes. They pause until it has: otherwise a fast link would finish first."""
    launcher, *others = hold_family(process.pid)
    try:
        process.send_signal(signal.SIGTERM)
        send(launcher, signal.SIGCONT)
        until = time.monotonic() + HELD
        while process.poll() is None and not any(map(_is_asked, others)) and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        for pid in others:
            send(pid, signal.SIGCONT)


def _is_asked(pid: int) -> bool:
    """Whether a SIGTERM is pending for a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended
        return False
    waiting = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(signals >> (signal.SIGTERM - 1) & 1 for signals in waiting)


def _ended(what: str, code: int, right: int) -> Finding:
    return Finding(f"exit code of {what}", code, right, right)


def _compare(whole: Path, halves: Path, job: str, kept: Sequence[str], most: float) -> list[Finding]:
    """Compare the losses of all steps, weights, moving averages and scores of a job in two run folders."""
    one, two = (_losses(run, job) for run in (whole, halves))
    manifests = [read_manifest(run / "jobs" / job) for run in (whole, halves)]
    findings = [
        holds(f"{job}: went on after the steps that it had", len(kept) == STOP and _lines(halves, job)[:STOP] == kept),
        holds(f"{job}: all steps", len(one) == len(two) == STEPS),
        Finding(f"{job}: losses", largest(abs(a - b) / abs(a) for a, b in zip(one, two, strict=False)), most),
        holds(f"{job}: scores", all(_scored(manifest["scores"]) for manifest in manifests)),
    ]
    for kind in ("model", "model/ema"):
        right, found = (_weights(run / "jobs" / job / kind) for run in (whole, halves))
        off = _norm(found[name] - tensor for name, tensor in right.items()) / _norm(right.values())
        findings.append(Finding(f"{job}: {kind}", off, most))
    return findings


def _losses(run: Path, job: str) -> list[float]:
    return [row["loss"] for row in read_metrics(_log(run, job), "train")]


def _scored(scores: Mapping[str, Any]) -> bool:
    return scores.keys() == {"held_out", "choose"} and all(math.isfinite(score["top1"]) for score in scores.values())


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().norm().item() ** 2 for tensor in tensors))
