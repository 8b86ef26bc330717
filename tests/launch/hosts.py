"""Two hosts on one machine: network namespaces with a cable between them; plain processes where that is forbidden."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

    def unplug(self) -> None:
        ip("-n", self.names[0], "link", "set", "cable0", "down")

    def close(self) -> None:
        """End what was started and take the namespaces away, and with them the cable."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:
            remove(name)


def remove(name: str) -> None:
    for pid in ip("netns", "pids", name, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", name, check=False)


def sweep() -> None:
    """Take away the namespaces of tests that were killed."""
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
