"""Whether the nodes of a cluster are fit for a training: what each process sees, compared, and one finding for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from compt.dist import collectives as dist
from compt.dist.environment import find_place
from compt.dist.doctor.facts import facts_here
from compt.dist.doctor.together import Together, check_together

State = Literal["ok", "note", "wrong", "not checked"]

Facts = Mapping[str, Any]
"""What one process found, as `compt.dist.doctor.facts.facts_here` says it."""

GIB = 2**30
MIB = 2**20

FREE_DISK = 20 * GIB
"""Less of it is a note: a few checkpoints of a large model. A twentieth of it is wrong."""
SHARED_MEMORY = 2 * GIB
"""Less of it is a note; what containers start with, 64 MiB, is wrong: pictures pass through it."""
OPEN_FILES = 4096
SECONDS_SEEN = 10.0
"""A file that takes longer to be seen by other nodes is wrong, one that takes a tenth of it is a note."""
CLOCKS = 5.0
"""Seconds that clocks may differ by; a tenth of it is a note."""


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy` says what to do about a note or something wrong."""

    check: str
    state: State
    found: str
    remedy: str = ""


def examine(folder: Path) -> list[Finding]:
    """Look at this machine, or under srun or torchrun at every node; the same findings on all ranks.

    `folder` is where runs are going to lie: it is made, written to and left as it was. Raises ConfigError or RunError
    where the processes do not find each other.
    """
    # On CPUs and gloo: a GPU that is missing on one node must be found, not waited for.
    # Joining changes the environment.
    place = find_place(os.environ)
    dist.init("cpu")
    together = check_together(folder, place)
    everyone = dist.gather_objects(facts_here(folder, place))
    return judge(everyone, together)


def judge(everyone: Sequence[Facts], together: Together) -> list[Finding]:
    """The findings for what the processes saw, in the order of ranks, and what they did together."""
    nodes: dict[str, Facts] = {}
    for facts in everyone:
        nodes.setdefault(facts["node"], facts)
    findings = [_processes(everyone, nodes), *_gpus(everyone, nodes), *_versions(everyone)]
    findings += [*_disk(nodes, together), _clocks(together), *_network(nodes, together), *_limits(nodes)]
    return findings


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain values: whether nothing is wrong, and the findings."""
    return {"ok": is_fit(findings), "findings": [asdict(finding) for finding in findings]}


def is_fit(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong; notes may be there."""
    return all(finding.state != "wrong" for finding in findings)


def _by_value(items: Mapping[str, Any]) -> str:
    """{"n1": 1, "n2": 1, "n3": 2} -> "1 on n1, n2; 2 on n3"; the value alone where all have the same."""
    groups: dict[str, list[str]] = {}
    for name, value in items.items():
        groups.setdefault(str(value), []).append(name)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items())


def _same(items: Mapping[str, Any]) -> bool:
    return len({str(value) for value in items.values()}) == 1


def _processes(everyone: Sequence[Facts], nodes: Mapping[str, Facts]) -> Finding:
    counts = {name: sum(facts["node"] == name for facts in everyone) for name in nodes}
    found = f"{len(everyone)} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(nodes)}"
    if not _same(counts):
        return Finding("processes", "note", _by_value(counts), "start as many on each node: --ntasks-per-node")
    return Finding("processes", "ok", found)


def _gpus(everyone: Sequence[Facts], nodes: Mapping[str, Facts]) -> list[Finding]:
    drivers = {name: facts["driver"] or "none" for name, facts in nodes.items()}
    if set(drivers.values()) == {"none"}:
        return [Finding("GPUs", "not checked", "no NVIDIA driver here: driver, CUDA, GPUs and NCCL were not looked at")]
    findings = []
    same = "have the same image on all nodes, or leave the odd ones out (sbatch --exclude)"
    findings.append(Finding("driver", "ok" if _same(drivers) else "wrong", _by_value(drivers), same))
    unusable = {name: facts["cuda_error"] for name, facts in nodes.items() if facts["driver"] and not facts["gpus"]}
    if unusable:
        remedy = "take a torch for this driver's CUDA (constraints-cu12.txt), or a newer driver; ask for GPUs: --gpus"
        findings.append(Finding("CUDA", "wrong", _by_value(unusable), remedy))
        return findings
    findings.append(Finding("CUDA", "ok", f"torch for CUDA {_by_value({n: f['cuda'] for n, f in nodes.items()})}"))
    kinds = {name: ", ".join(sorted(facts["gpus"])) for name, facts in nodes.items()}
    counted = {name: f"{len(facts['gpus'])} x {kinds[name].split(', ')[0]}" for name, facts in nodes.items()}
    uniform = _same(kinds) and all(len(set(facts["gpus"])) == 1 for facts in nodes.values())
    remedy = "take nodes of one kind (sbatch --constraint); the slowest GPU sets the pace of all"
    findings.append(Finding("GPUs", "ok" if uniform else "note", _by_value(counted if uniform else kinds), remedy))
    lacking = [facts for facts in everyone if facts["gpu"] >= len(facts["gpus"])]
    if lacking:
        found = "; ".join(f"process {f['local_rank']} of {f['node']} sees {len(f['gpus'])}" for f in lacking)
        findings.append(Finding("a GPU for each", "wrong", found, "start one process for each GPU: --gpus-per-node"))
    nccl = {name: facts["nccl"] for name, facts in nodes.items()}
    findings.append(Finding("NCCL", "ok" if _same(nccl) else "wrong", _by_value(nccl), same))
    return findings


def _versions(everyone: Sequence[Facts]) -> list[Finding]:
    packages = sorted({name for facts in everyone for name in facts["versions"]})
    found = {
        name: {f"rank {facts['rank']}": facts["versions"].get(name, "none") for facts in everyone} for name in packages
    }
    different = {name: values for name, values in found.items() if not _same(values)}
    remedy = "use one environment on all nodes: a shared .venv, or the same container"
    if different:
        return [Finding(name, "wrong", _by_value(values), remedy) for name, values in different.items()]
    shown = ", ".join(f"{name} {next(iter(values.values()))}" for name, values in found.items())
    return [Finding("versions", "ok", shown)]


def _disk(nodes: Mapping[str, Facts], together: Together) -> list[Finding]:
    free = {name: facts["free_disk"] for name, facts in nodes.items()}
    least = min(free, key=lambda name: free[name])
    state: State = "ok" if free[least] >= FREE_DISK else "note" if free[least] >= FREE_DISK / 20 else "wrong"
    remedy = "make room, or take another --run; keep_checkpoints says how many states are kept"
    findings = [Finding("free disk", state, f"{free[least] / GIB:.1f} GiB in {nodes[least]['folder']}", remedy)]
    if together.alone:
        return [*findings, Finding("shared disk", "not checked", "one node: start it under srun or torchrun on all")]
    if together.unseen:
        ranks = ", ".join(map(str, together.unseen))
        remedy = "put the run folder on a disk that all nodes have (NFS, Lustre, GPFS)"
        return [*findings, Finding("shared disk", "wrong", f"ranks {ranks} do not see what rank 0 wrote", remedy)]
    slowest = max(together.seconds)
    state = "ok" if slowest < SECONDS_SEEN / 10 else "note"
    remedy = "mount it with a shorter attribute cache (NFS: actimeo=1)"
    findings.append(Finding("shared disk", state, f"a file of rank 0 is seen after {slowest:.2f} s", remedy))
    state = "wrong" if together.torn else "ok"
    found = f"ranks {', '.join(map(str, together.torn))} read half a file, or none" if together.torn else "is atomic"
    findings.append(Finding("renaming", state, found, "take a POSIX file system; a resume relies on it"))
    held = not together.unlocked
    found = "keep others out" if held else f"do not keep ranks {', '.join(map(str, together.unlocked))} out"
    remedy = "mount with locks (Lustre: -o flock, NFS: no nolock); two jobs could write one run folder"
    return [*findings, Finding("locks", "ok" if held else "wrong", found, remedy)]


def _clocks(together: Together) -> Finding:
    if together.alone:
        return Finding("clocks", "not checked", "one node")
    apart = max(together.clocks) - min(together.clocks)
    state: State = "ok" if apart < CLOCKS / 10 else "note" if apart < CLOCKS else "wrong"
    return Finding("clocks", state, f"{apart:.3f} s apart", "let chrony or ntpd set them")


def _network(nodes: Mapping[str, Facts], together: Together) -> list[Finding]:
    own = {name: f"{facts['interface']} ({facts['address']})" for name, facts in nodes.items()}
    found = ", ".join(f"{name}: {value}" for name, value in own.items())
    local = [name for name, facts in nodes.items() if facts["address"].startswith("127.") or facts["address"] == "::1"]
    state: State = "note" if local and len(nodes) > 1 else "ok"
    remedy = f"{', '.join(local)}: the host's own name is a loopback address; name the interface in GLOO_SOCKET_IFNAME "
    findings = [Finding("network", state, found, remedy + "and NCCL_SOCKET_IFNAME" if local else "")]
    if together.collectives:
        if "nccl" not in together.collectives and any(facts["gpus"] for facts in nodes.values()):
            found = "not every process has a GPU of its own: start one for each GPU"
            findings.append(Finding("nccl", "not checked", found))
        for backend, tried in together.collectives.items():
            right = not tried.problem
            told = f"all-reduce of 4 MiB {f'in {tried.milliseconds:.1f} ms' if right else f'failed: {tried.problem}'}"
            remedy = "see what NCCL_DEBUG=INFO says, and check the cables and the driver"
            findings.append(Finding(backend, "ok" if right else "wrong", told, remedy))
    return findings


def _limits(nodes: Mapping[str, Facts]) -> list[Finding]:
    rules: list[tuple[str, str, Callable[[Any], State], Callable[[Any], str], str]] = [
        (
            "shared memory",
            "shared_memory",
            lambda size: "ok" if size >= SHARED_MEMORY else "note" if size > 64 * MIB else "wrong",
            lambda size: f"{size / MIB:,.0f} MiB in /dev/shm",
            "docker run --shm-size=16g, Kubernetes: an emptyDir of medium Memory at /dev/shm; or engine.workers: 0",
        ),
        (
            "open files",
            "open_files",
            lambda limit: "ok" if limit >= OPEN_FILES else "note",
            str,
            f"ulimit -n {OPEN_FILES} before the start, or LimitNOFILE of slurmd",
        ),
        (
            "locked memory",
            "locked_memory",
            lambda limit: "ok" if limit is None else "note",
            lambda limit: "unlimited" if limit is None else f"{limit / MIB:,.0f} MiB",
            "ulimit -l unlimited (LimitMEMLOCK of slurmd): InfiniBand needs it",
        ),
    ]
    findings = []
    for check, key, judged, shown, remedy in rules:
        states = {name: judged(facts[key]) for name, facts in nodes.items()}
        worst: State = max(states.values(), key=("ok", "note", "wrong").index)
        if check == "locked memory" and not any(facts["infiniband"] for facts in nodes.values()):
            worst, remedy = "ok", ""
        findings.append(Finding(check, worst, _by_value({n: shown(f[key]) for n, f in nodes.items()}), remedy))
    return findings
