"""Where a host's own name leads to itself, gloo is told by which interface others are reached."""

from __future__ import annotations

import socket

import pytest

from llm.config import ConfigError
from llm.launch import Place
from llm.strategy import Single, interface
from llm.strategy.rendezvous import Rendezvous


class Met(Rendezvous):
    """Two nodes that have met."""

    def __init__(self, *hosts: str, local_world_size: int = 1) -> None:
        super().__init__(Place(0, 0, 2, local_world_size, 0, "a", 1, "srun"), None)
        self._hosts = list(hosts)

    def hosts(self) -> list[str]:
        return self._hosts


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(socket, "gethostname", lambda: "mine")


def chosen(monkeypatch: pytest.MonkeyPatch, met: Rendezvous, address: str, towards: str | None) -> str:
    import os

    monkeypatch.setattr(socket, "gethostbyname", lambda host: address)
    monkeypatch.setattr(interface, "_towards", lambda host: towards)
    interface.choose_interface(met)
    return os.environ["GLOO_SOCKET_IFNAME"]


def test_chosen_only_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, Met("mine", "other"), "10.0.0.1", "eth0") == "", "the name leads elsewhere"
    assert chosen(monkeypatch, Met("mine", "mine", local_world_size=2), "127.0.1.1", "eth0") == "", "one node"
    assert chosen(monkeypatch, Met("mine", "other"), "127.0.1.1", "eth0") == "eth0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert chosen(monkeypatch, Met("mine", "other"), "127.0.1.1", "eth0") == "ib0", "the user has said it"


def test_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"mine resolves to 127.… .* leads to other - export GLOO_SOCKET_IFNAME"):
        chosen(monkeypatch, Met("mine", "other"), "127.0.1.1", None)


def test_loopback_is_no_way_to_others() -> None:
    assert interface._towards("127.0.0.1") is None
    assert interface._towards("no.such.host.invalid") is None


@pytest.mark.parametrize(("devices", "taken"), [("auto", "cuda:0"), (1, "cuda:0"), ([1], "cuda:1")])
def test_one_process_takes_the_gpu_that_a_list_names(devices: str | int | list[int], taken: str) -> None:
    assert str(Single("gpu", devices).root_device) == taken
    assert str(Single("cpu", devices).root_device) == "cpu"
