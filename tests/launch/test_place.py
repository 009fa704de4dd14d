"""What each launcher leaves in the environment, and what is refused of it."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.config import ConfigError
from llm.launch.place import ALONE, Place, first_host, place

PREFIXES = ("LLM_", "SLURM_", "TORCHELASTIC_", "MASTER_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}
# As SLURM 22.05 sets it in `srun -N2 -n3`.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)


def seen(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **changes: str | None) -> Place:
    """place() among these variables, some of them changed or, with None, taken away."""
    for name, value in {**variables, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return place()


def refusal(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **changes: str | None) -> str:
    with pytest.raises(ConfigError) as refused:
        seen(monkeypatch, variables, **changes)
    (mistake,) = refused.value.mistakes
    return mistake


def ours(**changes: str) -> dict[str, str]:
    return {**BY_HAND, "LLM_LAUNCHER": str(os.getppid()), "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", **changes}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NODE_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"},  # for a launcher of ours to come
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
        {**SRUN, "SLURM_STEP_ID": "4294967291"},
        {**SRUN, "SLURM_STEP_ID": "4294967290"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    assert seen(monkeypatch, variables) == ALONE


def test_our_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, ours()) == Place(1, 1, 2, 2, 0, "localhost", 29500, "launch")
    first = seen(monkeypatch, ours(RANK="0", LOCAL_RANK="0", LLM_STORE_FD="5"))
    assert (first.rank, first.store_fd) == (0, 5)


def test_our_launcher_comes_before_the_cluster_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, {**SRUN, **TORCHRUN, **ours()}).launcher == "launch"


def test_a_process_below_a_rank_is_not_that_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(monkeypatch, ours(LLM_LAUNCHER="1234567"))
    assert text.startswith("LLM_LAUNCHER: 1234567 - is set, but the launcher is not the parent of this process")
    unset = "unset LLM_LAUNCHER RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT"
    assert text.endswith(f"inherited from a rank, or stale: {unset}")


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, TORCHRUN) == Place(5, 1, 8, 4, 1, "n0", 29500, "torchrun")
    assert seen(monkeypatch, {**SRUN, **TORCHRUN}).launcher == "torchrun"  # one torchrun a node, started by srun
    one = seen(monkeypatch, TORCHRUN, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="0")
    assert (one.world_size, one.launcher) == (1, "torchrun")


def test_torchrun_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(monkeypatch, TORCHRUN, MASTER_ADDR=None, MASTER_PORT=None)
    assert "TORCHELASTIC_RUN_ID=none RANK=5 WORLD_SIZE=8" in text
    assert "without MASTER_ADDR and MASTER_PORT" in text
    assert "unset TORCHELASTIC_RUN_ID RANK" in text


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, SRUN) == Place(2, 0, 3, 1, 1, "n1", 20_007, "srun")
    second_step = seen(monkeypatch, SRUN, SLURM_STEP_ID="1", SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_NODEID="0")
    assert second_step == Place(1, 1, 3, 2, 0, "n1", 21_020, "srun")
    assert seen(monkeypatch, SRUN, SLURM_JOB_ID="123456789").port == 26_789
    assert seen(monkeypatch, SRUN, SLURM_STEP_NUM_TASKS=None).world_size == 3
    given = seen(monkeypatch, SRUN, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    assert (given.address, given.port) == ("10.0.0.1", 4000)


def test_srun_counts_the_tasks_of_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6"}
    assert seen(monkeypatch, SRUN, **layout, SLURM_NODEID="3").local_world_size == 1
    assert seen(monkeypatch, SRUN, **layout, SLURM_NODEID="2").local_world_size == 2


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"SLURM_PROCID": None}, "a task of srun without SLURM_PROCID"),
        ({"SLURM_NODEID": "two"}, "SLURM_NODEID must be a whole number"),
        ({"SLURM_NODEID": "2"}, "they contradict each other"),
        ({"SLURM_LOCALID": "1"}, "they contradict each other"),
        ({"SLURM_PROCID": "3"}, "they contradict each other"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "they contradict each other"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT must lie between 1 and 65535"),
    ],
)
def test_srun_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], rule: str) -> None:
    text = refusal(monkeypatch, SRUN, **changes)
    assert "SLURM_JOB_ID=7 SLURM_STEP_ID=0" in text
    assert f": {rule} - stale from another program, or incomplete: unset SLURM_JOB_ID SLURM_STEP_ID" in text
    for name, value in changes.items():
        assert value is None or f"{name}={value}" in text


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, BY_HAND) == Place(1, 1, 2, 2, 0, "localhost", 29500, "environment")
    nodes = seen(monkeypatch, BY_HAND, RANK="5", WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    assert (nodes.node_rank, nodes.local_world_size) == (1, 4)
    assert seen(monkeypatch, BY_HAND, NODE_RANK="3", RANK="5", WORLD_SIZE="8").node_rank == 3


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"WORLD_SIZE": None, "LOCAL_RANK": None}, "without WORLD_SIZE and LOCAL_RANK"),
        ({"RANK": None}, "without RANK"),
        ({"LOCAL_RANK": ""}, "without LOCAL_RANK"),
        ({"MASTER_PORT": None}, "without MASTER_PORT"),
        ({"RANK": "3"}, "without LOCAL_WORLD_SIZE, the number of ranks on this node"),
        ({"RANK": "2", "LOCAL_RANK": "2"}, "RANK must be below WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "RANK must be below WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK must be below LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE must be at most WORLD_SIZE"),
        ({"RANK": "one"}, "RANK must be a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be a whole number"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE must be a whole number"),
        ({"NODE_RANK": "x"}, "NODE_RANK must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must lie between 1 and 65535"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK must be below WORLD_SIZE"),
    ],
)
def test_by_hand_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], rule: str) -> None:
    text = refusal(monkeypatch, BY_HAND, **changes)
    assert f": {rule} - stale from another program, or incomplete: unset " in text
    assert text.endswith("set all of RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT")
    named = {**BY_HAND, **changes}
    assert all(f"{name}={value}" in text for name, value in named.items() if value is not None)
    (unset,) = re.findall(r"unset ([A-Z_ ]+)", text)
    assert set(unset.split()) == {name for name, value in named.items() if value is not None}


def expanded(hosts: list[tuple[str, list[tuple[str, str]]]]) -> list[str]:
    """Every host of a list, the long way: `[("n", [("08", "10")])]` is n08, n09, n10."""
    found = []
    for prefix, ranges in hosts:
        if not ranges:
            found.append(prefix)
        for low, high in ranges:
            found += [f"{prefix}{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return found


@st.composite
def node_ranges(draw: st.DrawFn) -> tuple[str, str]:
    width, low, length = draw(st.integers(1, 4)), draw(st.integers(0, 99)), draw(st.integers(0, 3))
    return f"{low:0{width}d}", str(low + length)


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z][a-z0-9.-]{0,5}", fullmatch=True), st.lists(node_ranges(), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_first_host_of_a_nodelist(hosts: list[tuple[str, list[tuple[str, str]]]]) -> None:
    def written(low: str, high: str) -> str:
        return low if int(low) == int(high) else f"{low}-{high.zfill(len(low))}"

    texts = [
        prefix + (f"[{','.join(written(*each) for each in ranges)}]" if ranges else "") for prefix, ranges in hosts
    ]
    assert first_host(",".join(texts)) == expanded(hosts)[0]


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node[01-04,7],other", "node01"), ("rack[2-3]n[05,9]-ib,x", "rack2n05-ib"), ("n7", "n7"), ("", "")],
)
def test_first_host_as_slurm_writes_it(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
