"""Groups and chains over two hosts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.optional import optional
from tests.helpers.ports import free_port
from tests.helpers.recipe import FIRST, SECOND, chain, largest_difference, make_data, stopped_at, weights, write_recipe
from tests.launch.hosts import Hosts, two_hosts

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launchers" / "train.py")
TOLERANCE = 2e-5


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as found:
        yield found


@pytest.fixture
def namespaces(hosts: Hosts) -> Hosts:
    if not hosts.names:
        pytest.skip(hosts.reason)
    return hosts


def outputs(hosts: Hosts, code: int, seconds: float = 200.0) -> list[str]:
    """The output of each process, once all have exited with the same code."""
    said = [process.communicate(timeout=seconds)[0] for process in hosts.started]
    assert [process.returncode for process in hosts.started] == [code] * len(said), "\n".join(said)
    return said


def slurm(hosts: Hosts, rank: int, job: int, each: int = 1) -> dict[str, str]:
    """What srun sets for a step of `each` tasks on each of two nodes that are called by their addresses."""
    names = f"{hosts.address(0).rpartition('.')[0]}.[1-2]" if hosts.names else "127.0.0.[1-2]"
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % each),
        "SLURM_NODEID": str(rank // each),
        "SLURM_NTASKS": str(2 * each),
        "SLURM_STEP_NUM_TASKS": str(2 * each),
        "SLURM_STEP_NODELIST": names,
        "SLURM_STEP_TASKS_PER_NODE": f"{each}(x2)",
        "SLURM_JOB_NODELIST": names,
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
    }


@pytest.mark.parametrize("spelling", ["{4}", "{6}", "[{6}]"])
def test_two_hosts_connect(namespaces: Hosts, tmp_path: Path, spelling: str) -> None:
    master = spelling.replace("{4}", namespaces.address(0)).replace("{6}", namespaces.address(0, 6))
    for rank in (0, 1):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": master, "MASTER_PORT": "29400"}
        namespaces.join(rank, tmp_path, **place)
    # gloo itself would use the loopback, because the machine's name resolves to it.
    assert namespaces.said(0) == [f"rank {rank} of 2: 1 by cable{rank}\n" for rank in (0, 1)]


def test_a_given_interface_is_used(namespaces: Hosts, tmp_path: Path) -> None:
    for rank in (0, 1):
        place = slurm(namespaces, rank, 1)
        namespaces.join(rank, tmp_path, **place, GLOO_SOCKET_IFNAME=f"cable{rank}")
    assert namespaces.said(0) == [f"rank {rank} of 2: 1 by cable{rank}\n" for rank in (0, 1)]


def test_srun_on_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    job = free_port()
    for rank in range(4):
        hosts.join(rank // 2, tmp_path, **slurm(hosts, rank, job, each=2))
    for rank, said in enumerate(hosts.said(0)):
        assert said.startswith(f"rank {rank} of 4: 6")


def test_every_rank_names_a_missing_master(namespaces: Hosts, tmp_path: Path) -> None:
    for rank in range(4):
        place = slurm(namespaces, rank, 2, each=2)
        master = {"MASTER_ADDR": "10.213.77.9", "COMPT_CONNECT_SECONDS": "5"}
        namespaces.join(rank // 2, tmp_path, **place, **master)
    for rank, said in enumerate(namespaces.said(5, 90.0)):
        assert said.count("\n") == 1, said
        assert f"rank {rank} of 4 found no process group at 10.213.77.9:10032 within 5 s" in said


def test_each_side_names_a_cable_that_is_unplugged(namespaces: Hosts, tmp_path: Path) -> None:
    namespaces.unplug()
    for rank in (0, 1):
        namespaces.join(rank, tmp_path, **slurm(namespaces, rank, 3), COMPT_CONNECT_SECONDS="5")
    first, second = namespaces.said(5, 60.0)
    assert "rank 1 did not connect" in first
    assert first.count("\n") == second.count("\n") == 1


# --- whole chains


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    write_recipe(folder / "tiny.yaml")
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    chain(base, run)
    return run


def assert_same(whole: Path, run: Path) -> None:
    assert largest_difference(weights(whole, SECOND), weights(run, SECOND)) < TOLERANCE
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_a_chain_by_torchrun_on_two_hosts(hosts: Hosts, base: Path, whole: Path, tmp_path: Path) -> None:
    """Begun on one process, and finished by torchrun."""
    stopped_at(base, tmp_path / "run", 3)
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{hosts.address(0)}:{free_port()}", "--rdzv_id", "7"]
    for host in (0, 1):
        words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meet]
        # The machine's name resolves to its loopback, so torchrun cannot know which host serves the endpoint.
        local = ["--local_addr", hosts.address(host), "--rdzv_conf", f"is_host={int(host == 0)}"]
        options = ["--recipe", "tiny.yaml", "--run-folder", str(tmp_path / "run")]
        # Under `compt launch`, as docs/cluster.md says.
        start = [sys.executable, "-m", "compt", "launch", sys.executable]
        hosts.start(host, [*start, *words, *local, TRAIN, *options], base)
    said = "".join(outputs(hosts, 0, 400.0))
    assert said.count(f"{FIRST}: evaluating") == 1, "one process speaks"
    assert_same(whole, tmp_path / "run")


@pytest.mark.full
def test_a_chain_by_srun_on_two_hosts(hosts: Hosts, base: Path, whole: Path, tmp_path: Path) -> None:
    job = free_port()
    for rank in (0, 1):
        words = [sys.executable, TRAIN, "--recipe", "tiny.yaml", "--run-folder", str(tmp_path / "run")]
        hosts.start(rank, words, base, **slurm(hosts, rank, job))
    said = outputs(hosts, 0, 400.0)
    assert "evaluating" in said[0]
    assert "evaluating" not in said[1]
    assert_same(whole, tmp_path / "run")


@pytest.mark.full
def test_a_chain_by_deepspeed_with_a_hostfile(hosts: Hosts, base: Path, whole: Path, tmp_path: Path) -> None:
    optional("deepspeed", "deepspeed")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in ("first", "second")))
    port = str(free_port())
    for host in (0, 1):
        words = ["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(host)]
        words += ["--master_addr", hosts.address(0), "--master_port", port, TRAIN]
        options = ["--recipe", "tiny.yaml", "--run-folder", str(tmp_path / "run")]
        config = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json"), "--set", "engine.device=cpu"]
        hosts.start(host, [sys.executable, *words, *options, *config], base)
    outputs(hosts, 0, 400.0)
    assert_same(whole, tmp_path / "run")


@pytest.mark.full
def test_a_chain_by_accelerate_on_two_hosts(hosts: Hosts, base: Path, whole: Path, tmp_path: Path) -> None:
    optional("accelerate", "accelerate")
    port = str(free_port())
    for host in (0, 1):
        words = ["-m", "accelerate.commands.accelerate_cli", "launch"]
        words += ["--config_file", str(ROOT / "launchers" / "accelerate" / "nodes.yaml")]
        words += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(host)]
        words += ["--main_process_ip", hosts.address(0), "--main_process_port", port, TRAIN]
        options = ["--recipe", "tiny.yaml", "--run-folder", str(tmp_path / "run"), "--set", "engine.device=cpu"]
        hosts.start(host, [sys.executable, *words, *options], base)
    outputs(hosts, 0, 400.0)
    assert_same(whole, tmp_path / "run")
