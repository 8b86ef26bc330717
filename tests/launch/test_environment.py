"""The rank and group that an environment describes: recorded, invented and contradictory environments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compt.dist.environment import Place, connect_limit, find_place, first_node, own_rank
from compt.errors import ConfigError

RECORDED = Path(__file__).parent / "environments"
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29400",
}


def recorded(name: str) -> list[dict[str, str]]:
    """The environment of every task of a recorded step."""
    values: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return [{**values["common"], **task} for task in values["tasks"]]


def places(name: str) -> list[Place]:
    found = [find_place(task) for task in recorded(name)]
    assert all(place is not None for place in found)
    return [place for place in found if place is not None]


# --- node lists


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("gpu7", "gpu7"),
        ("a[01-03,7],b9-[1-2]x", "a01"),
        ("n[8-11]", "n8"),
        ("n[08-11],m", "n08"),
        ("r[1-2]n[3-4]x", "r1n3x"),
        ("a-2.example.org,b,c", "a-2.example.org"),
        ("n[1-999999999999][1-99999]", "n11"),
    ],
)
def test_the_first_node_of_a_list(text: str, name: str) -> None:
    assert first_node(text) == name


@pytest.mark.parametrize(
    "text", ["", "a[1-2", "a]1[", "a,,b", "a,", "a[1-]", "a[x]", "a[[1]]", "a[1;2]", "n" * 10**6 + "["]
)
def test_invalid_node_lists_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a list of Slurm nodes"):
        first_node(text)


# --- what srun sets


@pytest.mark.parametrize(("name", "nodes", "each"), [("1_node", 1, 2), ("2_nodes", 2, 2), ("16_nodes", 16, 2)])
def test_recorded_steps(name: str, nodes: int, each: int) -> None:
    found = places(f"slurm_{name}")
    assert [place.rank for place in found] == list(range(nodes * each))
    assert [place.local_rank for place in found] == list(range(each)) * nodes
    assert {(place.world_size, place.master, place.port) for place in found} == {(nodes * each, "big15", found[0].port)}


def test_a_step_on_some_nodes_of_the_job() -> None:
    found = places("slurm_part_of_a_job")
    assert [(place.rank, place.local_rank, place.master) for place in found] == [
        *((0, 0, "big15"), (1, 1, "big15"), (2, 0, "big15")),
    ]


def test_the_script_of_a_job_is_one_process() -> None:
    (script,) = recorded("slurm_script")
    assert script["SLURM_NTASKS"] == "4"
    assert find_place(script) is None
    assert own_rank(script) == "0"


def test_a_batch_script_with_variables_of_another_step_is_refused() -> None:
    (script,) = recorded("slurm_script_from_a_step")
    with pytest.raises(ConfigError, match="submitted from inside the step of another job.*unset SLURM_STEP_NUM_TASKS"):
        find_place(script)


def test_a_step_of_one_task_is_one_process() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert find_place(step) is None


def test_torchrun_variables_take_precedence_over_srun() -> None:
    for task in recorded("slurm_2_nodes"):
        place = find_place({**task, **TORCHRUN})
        assert place == Place(5, 8, 1, "head", 29400)
        assert own_rank({**task, **TORCHRUN}) == "5"


def test_steps_of_jobs_take_different_ports() -> None:
    (task, *_) = recorded("slurm_2_nodes")
    ports = set()
    for job in range(4_000_000, 4_000_040):
        for step in range(16):
            place = find_place({**task, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            assert place is not None
            assert 10_000 <= place.port < 30_000
            ports.add(place.port)
    assert len(ports) == 40 * 16


def test_master_and_port_can_be_set() -> None:
    for task in recorded("slurm_2_nodes"):
        place = find_place({**task, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"})
        assert place is not None
        assert (place.master, place.port) == ("10.0.0.1", 4711)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be below SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x: must be a whole number"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID=: must be a whole number"),
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "neither SLURM_STEP_NODELIST nor"),
        ({"SLURM_STEP_NODELIST": "big[15-"}, "not a list of Slurm nodes"),
        ({"SLURM_PROCID": "0"}, "rank 0 runs on node 1.*set MASTER_ADDR"),
        ({"SLURM_HET_SIZE": "2"}, "several Slurm jobs.*torchrun on each node"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID="),
    ],
)
def test_a_contradictory_step_is_refused(changes: dict[str, str], message: str) -> None:
    step = {**recorded("slurm_2_nodes")[3], **changes}
    with pytest.raises(ConfigError, match=message) as caught:
        find_place(step)
    assert "\n" not in str(caught.value)


# --- what torchrun and similar launchers set


def test_no_environment() -> None:
    assert find_place({}) is None
    assert own_rank({}) == "0"


def test_torchrun() -> None:
    place = find_place(TORCHRUN)
    assert place == Place(5, 8, 1, "head", 29400)
    assert place.variables() == {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}


@pytest.mark.parametrize(
    ("text", "host", "address"),
    [
        ("10.0.0.1", "10.0.0.1", "10.0.0.1:29400"),
        ("node-1.example.org", "node-1.example.org", "node-1.example.org:29400"),
        ("fd00::1", "fd00::1", "[fd00::1]:29400"),
        ("[fd00::1]", "fd00::1", "[fd00::1]:29400"),
        ("fe80::1%eth0", "fe80::1%eth0", "[fe80::1%eth0]:29400"),
    ],
)
def test_addresses(text: str, host: str, address: str) -> None:
    place = find_place({**TORCHRUN, "MASTER_ADDR": text})
    assert place is not None
    assert (place.master, place.address, place.variables()["MASTER_ADDR"]) == (host, address, host)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE is set but RANK is not"),
        ({"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not"),
        ({"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1: must be a whole number, 0 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number, 1 or more"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_RANK": "6", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=6 is above RANK=5"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is above WORLD_SIZE=8"),
        ({"MASTER_PORT": "65536"}, "ports end at 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: .*torchrun --standalone"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"MASTER_ADDR": "head:29500"}, "put the port into MASTER_PORT"),
        ({"MASTER_ADDR": "tcp://head"}, "neither a name nor an address"),
        ({"MASTER_ADDR": ""}, "neither a name nor an address"),
    ],
)
def test_a_contradictory_environment_is_refused(changes: dict[str, str | None], message: str) -> None:
    merged = {**TORCHRUN, **changes}
    with pytest.raises(ConfigError, match=message):
        find_place({name: value for name, value in merged.items() if value is not None})


def test_the_time_to_connect() -> None:
    assert connect_limit({}) == 60.0
    assert connect_limit({"COMPT_CONNECT_SECONDS": "180"}) == 180.0
    for text in ("", "soon", "0", "-3", "nan", "inf"):
        with pytest.raises(ConfigError, match="COMPT_CONNECT_SECONDS"):
            connect_limit({"COMPT_CONNECT_SECONDS": text})


def test_a_place_names_the_variables_that_it_comes_from() -> None:
    place = Place(0, 2, 0, "head", 29500)
    assert place.origin == "RANK=0 and WORLD_SIZE=2"
    assert replace(place, by_slurm=True).origin == "SLURM_PROCID=0 and SLURM_STEP_NUM_TASKS=2"
