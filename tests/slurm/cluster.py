"""A Slurm cluster of two nodes on this machine, from Debian's packages, with daemons, keys and folders of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv", "unshare")

# The nodes claim more cores than the machine has, and GPUs, so that Slurm grants what the scripts request.
CONF = """
ClusterName=compt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2
ReturnToService=2
SlurmdTimeout=10
MinJobAge=3600
KillWait=30
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=1000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


def missing() -> str | None:
    """The reason why no cluster can run here, or None."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return None


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:g} s")


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def title_of(pid: int) -> str:
    """The command line of a process, or "" if it has exited."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    return ""


def parent_of(pid: int) -> int:
    """The parent of a process, or 0 if it has exited."""
    with contextlib.suppress(OSError):
        found = re.search(r"^PPid:\s*(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


class Cluster:
    """Daemons that exit with this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = {**own, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("munge", "state", "log", "out"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for number in range(8):
            # slurmd takes only devices for GPUs: these are as /dev/null.
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        conf = CONF.format(host=self.host, folder=self.folder, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(conf)
        lines = [Path("/etc/hosts").read_text(encoding="utf-8"), *(f"127.0.0.1 {node}\n" for node in NODES)]
        (self.folder / "hosts").write_text("".join(lines))
        paths = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        munge = [f"--{option}={self.folder}/munge/{name}" for option, name in paths.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", *munge])
        until((self.folder / "munge" / "socket").exists, 20, "munged")
        self._daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for node in NODES:
            self.start_node(node)
        until(lambda: all(state.startswith("idle") for state in self.node_states().values()), 60, "both nodes idle")

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_node(self, node: str) -> None:
        """slurmd with its own /etc/hosts, which has the nodes' names. No other process sees that file."""
        script = 'mount --bind "$0" /etc/hosts && exec slurmd -D -N "$1"'
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        self._daemon(node, [*command, str(self.folder / "hosts"), node])

    def crash_node(self, node: str) -> None:
        """Kill everything on a node at once, like a power cut."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()
        own = [pid for pid, values, _ in self.processes() if values.get("SLURMD_NODENAME") == node]
        # Their parents, too: these would report to Slurm that they ended.
        stepds = {parent for parent in map(parent_of, own) if "slurmstepd" in title_of(parent)}
        for pid in (*stepds, *own):
            kill(pid)

    def processes(self) -> Iterator[tuple[int, dict[str, str], str]]:
        """(pid, environment, command line) of every process that belongs to this cluster."""
        mark = self.environment["SLURM_CONF"]
        for path in Path("/proc").glob("[0-9]*"):
            try:
                raw = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            values = dict(item.partition("=")[::2] for item in raw if "=" in item)
            if values.get("SLURM_CONF") == mark and int(path.name) != os.getpid():
                yield int(path.name), values, title_of(int(path.name))

    def rank(self, job: str, number: int) -> int:
        """The process of a rank of a job's step."""
        for pid, values, title in self.processes():
            own = (values.get("SLURM_JOB_ID"), values.get("SLURM_PROCID"))
            if (
                own == (job, str(number))
                and "compt chain" in title
                and "srun" not in title
                and "SLURM_STEP_ID" in values
            ):
                return pid
        raise AssertionError(f"rank {number} of job {job} is not running")

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid, _, _ in self.processes():
            kill(pid)
        until(lambda: not list(self.processes()), 10, "the end of all of the cluster's processes")

    def run(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command on the login node, in the checkout's top folder."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *words: str, **variables: str) -> str:
        """Run a command that calls sbatch. Returns the id of the job, whose output is in out/ID."""
        variables = {"SBATCH_OPEN_MODE": "append", **variables}
        found = re.search(r"(?:Submitted batch job )?(\d+)\s*$", self.run(*words, **variables).stdout)
        assert found
        return found[1]

    @property
    def output(self) -> str:
        """The option of sbatch that says where output goes."""
        return f"--output={self.folder}/out/%j"

    def said(self, job: str) -> str:
        path = self.folder / "out" / job
        return path.read_text(errors="replace") if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job, or {}."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job, check=False).stdout
        return dict(item.partition("=")[::2] for item in shown.split() if "=" in item)

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "")

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """What scontrol shows of a job once it is over, which has to be in one of `states`."""
        try:
            until(lambda: self.state(job) in (*OVER, *states), seconds, f"job {job} over")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.show(job)}\n{self.said(job)}\n{self.logs()}") from None
        shown = self.show(job)
        assert shown["JobState"] in states, f"{shown}\n{self.said(job)}\n{self.logs()}"
        return shown

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).stdout.splitlines()
        return dict(line.split() for line in lines)

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted((self.folder / "log").iterdir())}
        return "\n".join(f"== {name}\n{text[-1500:]}" for name, text in texts.items())
