"""This process's place in its group, and where the group meets: read from the launcher's environment variables.

RANK, which torchrun, deepspeed and accelerate set, counts before the variables of `srun`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from compt.errors import ConfigError

Environment = Mapping[str, str]

FIRST_PORT, PORTS = 10_000, 20_000
"""Below the ports that systems hand out (32768 and above), and above those of services."""


@dataclass(frozen=True)
class Place:
    """One process of a group, and the host and port where the group meets."""

    rank: int
    world_size: int
    local_rank: int
    master: str
    port: int
    by_slurm: bool = False
    """Whether `srun` started the process, without another launcher."""

    @property
    def address(self) -> str:
        """The meeting point for messages: host:port, or [host]:port for an IPv6 address."""
        return f"[{self.master}]:{self.port}" if ":" in self.master else f"{self.master}:{self.port}"

    def gpu(self, visible: int) -> int:
        """The index of this process's GPU among the visible ones. Slurm may show each task only its own."""
        return 0 if self.by_slurm and visible == 1 else self.local_rank

    @property
    def origin(self) -> str:
        """The environment variables that say that there are other processes, for messages."""
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if self.by_slurm else ("RANK", "WORLD_SIZE")
        return f"{names[0]}={self.rank} and {names[1]}={self.world_size}"

    def variables(self) -> dict[str, str]:
        """The environment variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }


def first_node(text: str) -> str:
    """Return the first name in a Slurm node list: "a[01-03,7],b9-[1-2]x" -> a01. Raises ConfigError for other text."""
    name = r"(?:[^,\[\]]|\[\d+(?:[-,]\d+)*\])+"
    if not re.fullmatch(f"{name}(?:,{name})*", text):
        raise ConfigError(f"'{text}' is not a list of Slurm nodes such as gpu[01-04,7]")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", text).partition(",")[0]


def find_place(environment: Environment) -> Place | None:
    """Return this process's place; None for a single process. Raises ConfigError for a contradictory environment."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_launcher(environment)
    # A job script has SLURM_NTASKS and SLURM_PROCID too, but it is not a task of a step: it runs once.
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return _from_slurm(environment)
    return None


def own_rank(environment: Environment) -> str:
    """Return the rank for messages before a group is joined; "0" for a single process."""
    if "RANK" in environment:
        return environment["RANK"]
    return environment.get("SLURM_PROCID", "0") if "SLURM_STEP_NUM_TASKS" in environment else "0"


def has_others(environment: Environment) -> bool:
    """Whether this process is one of several ranks. Reads the environment, as a rank may fail before they meet."""
    return any(environment.get(name, "1") not in ("", "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def _from_launcher(environment: Environment) -> Place:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            other = "RANK" if name != "RANK" else "WORLD_SIZE"
            raise ConfigError(f"{other} is set but {name} is not: start with torchrun, set it, or unset {other}")
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", least=1)
    local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
    _check(rank < world, f"RANK={rank} must be below WORLD_SIZE={world}")
    _check(local <= rank, f"LOCAL_RANK={local} is above RANK={rank}: ranks are counted node by node")
    if "LOCAL_WORLD_SIZE" in environment:
        size = _number(environment, "LOCAL_WORLD_SIZE", least=1)
        _check(local < size, f"LOCAL_RANK={local} must be below LOCAL_WORLD_SIZE={size}")
        _check(size <= world, f"LOCAL_WORLD_SIZE={size} is above WORLD_SIZE={world}")
    return Place(rank, world, local, _host(environment["MASTER_ADDR"]), _port(environment))


def _from_slurm(environment: Environment) -> Place | None:
    world = _number(environment, "SLURM_STEP_NUM_TASKS", least=1)
    rank, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    node = _number(environment, "SLURM_NODEID")
    if world == 1:
        return None
    remedy = "; start with torchrun on each node instead, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    _check("SLURM_HET_SIZE" not in environment, f"the job consists of several Slurm jobs (SLURM_HET_SIZE){remedy}")
    _check(rank < world, f"SLURM_PROCID={rank} must be below SLURM_STEP_NUM_TASKS={world}")
    _check(
        environment.get("SLURM_NTASKS", str(world)) == str(world),
        f"SLURM_STEP_NUM_TASKS={world} and SLURM_NTASKS={environment.get('SLURM_NTASKS')}: the job was submitted from "
        "inside the step of another job and has its variables; unset SLURM_STEP_NUM_TASKS, or start with srun",
    )
    listed = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environment.get(name)), None)
    _check(
        listed is not None, f"srun started {world} tasks, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set"
    )
    assert listed is not None
    if "MASTER_ADDR" not in environment:
        _check(
            rank > 0 or node == 0,
            f"rank 0 runs on node {node} of {listed}={environment[listed]}, but the others look for it on the first: "
            "set MASTER_ADDR, or remove --distribution=arbitrary",
        )
    master = _host(environment["MASTER_ADDR"]) if "MASTER_ADDR" in environment else first_node(environment[listed])
    return Place(rank, world, local, master, _slurm_port(environment), by_slurm=True)


def _slurm_port(environment: Environment) -> int:
    """Return MASTER_PORT, or a port computed from job and step, so that jobs on one node use different ports."""
    if "MASTER_PORT" in environment:
        return _port(environment)
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return FIRST_PORT + (16 * job + step % 16) % PORTS


def _check(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(f"the environment contradicts itself: {message}")


def _number(environment: Environment, name: str, least: int = 0) -> int:
    text = environment.get(name)
    if text is None or not re.fullmatch(r"\d+", text) or int(text) < least:
        raise ConfigError(f"{name}={'' if text is None else text}: must be a whole number, {least} or more")
    return int(text)


def _port(environment: Environment) -> int:
    port = _number(environment, "MASTER_PORT")
    if port == 0:
        raise ConfigError(
            "MASTER_PORT=0: every process must know the port: set one from 1, or on one node use torchrun "
            "--standalone, which finds a free port"
        )
    if port >= 2**16:
        raise ConfigError(f"MASTER_PORT={port}: ports end at {2**16 - 1}")
    return port


def _host(text: str) -> str:
    """Return a host name or an address; an IPv6 address may be in brackets, as in URLs. Raises ConfigError."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in host:
        try:
            # This accepts link-local addresses too, with their interface after a %.
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(
                f"MASTER_ADDR={text}: is neither a name nor an address; put the port into MASTER_PORT"
            ) from None
    if not host or re.search(r"[\s/\[\]]", host):
        raise ConfigError(f"MASTER_ADDR={text}: is neither a name nor an address")
    return host


def connect_limit(environment: Environment) -> float:
    """Return the time limit for the ranks to meet: COMPT_CONNECT_SECONDS, or 60. Raises ConfigError."""
    text = environment.get("COMPT_CONNECT_SECONDS", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"COMPT_CONNECT_SECONDS={text}: must be a number of seconds above 0")
    return seconds
