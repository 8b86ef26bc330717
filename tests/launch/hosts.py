"""Two hosts on one machine: network namespaces with a cable between them, or plain processes if those are forbidden."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from compt.dist import collectives as dist
from compt.errors import ComptError
from tests.helpers.process import finish, start

PREFIX = "compt-test-"
NETWORK = "10.213.77"
NETWORK_6 = "fd00:213:77:"


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=20)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Hosts:
    """`names` are those of the namespaces; () for plain processes."""

    names: tuple[str, ...]
    reason: str = ""
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    members: list[tuple[BaseProcess, Path]] = field(default_factory=list)

    def address(self, host: int, family: int = 4) -> str:
        if not self.names:
            return "127.0.0.1" if family == 4 else "::1"
        return f"{NETWORK}.{host + 1}" if family == 4 else f"{NETWORK_6}:{host + 1}"

    def start(self, host: int, words: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
        """Run a command on a host, with a clean environment of its own."""
        inside = ["ip", "netns", "exec", self.names[host]] if self.names else []
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        values: Mapping[str, str] = {**kept, **fixed, "DS_ACCELERATOR": "cpu", **environment}
        self.started.append(
            subprocess.Popen(
                [*inside, *words],
                cwd=folder,
                env=values,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def join(self, host: int, folder: Path, **environment: str) -> None:
        """Start a process on a host that joins the group of `environment`."""
        said = folder / f"member-{len(self.members)}"
        self.members.append((start(member, self.names[host] if self.names else "", said, environment), said))

    def said(self, code: int, seconds: float = 200.0) -> list[str]:
        """What each member said, when all have ended with one code."""
        codes = [finish(process, seconds) for process, _ in self.members]
        texts = [file.read_text() for _, file in self.members]
        assert codes == [code] * len(texts), "\n".join(texts)
        return texts

    def unplug(self) -> None:
        ip("-n", self.names[0], "link", "set", "cable0", "down")

    def close(self) -> None:
        """End all processes and remove the namespaces, and the cable with them."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for process, _ in self.members:
            process.kill()
            process.join()
        for name in self.names:
            remove(name)


def member(namespace: str, said: Path, environment: dict[str, str]) -> None:
    """Join a group on a host, sum the ranks, and say so; print an error."""
    if namespace:
        place = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(place, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        dist.init("cpu", timeout_seconds=60.0)
        total = dist.all_reduce_sum(dist.rank())
        print(f"rank {dist.rank()} of {dist.world_size()}: {total:g} by {os.environ.get('GLOO_SOCKET_IFNAME')}")
        dist.shutdown()
    except ComptError as error:
        print(error)
        sys.exit(error.exit_code)
    finally:
        sys.stdout.flush()


def remove(name: str) -> None:
    for pid in ip("netns", "pids", name, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", name, check=False)


def sweep() -> None:
    """Remove the namespaces of tests that were killed."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        number = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and number.isdecimal() and not Path(f"/proc/{number}").exists():
            remove(name)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    hosts = Hosts((), "needs root and `ip` to make network namespaces")
    names = tuple(f"{PREFIX}{os.getpid()}-{host}" for host in (0, 1))
    if os.geteuid() == 0 and shutil.which("ip"):
        try:
            sweep()
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
            for host, name in enumerate(names):
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "addr", "add", f"{NETWORK}.{host + 1}/24", "dev", f"cable{host}")
                ip("-n", name, "addr", "add", f"{NETWORK_6}:{host + 1}/64", "dev", f"cable{host}", "nodad")
                ip("-n", name, "link", "set", f"cable{host}", "up")
            hosts = Hosts(names)
        except OSError as error:
            for name in names:
                remove(name)
            hosts = Hosts((), f"no network namespaces here: {error}")
    try:
        yield hosts
    finally:
        hosts.close()
