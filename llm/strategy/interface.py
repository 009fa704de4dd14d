"""By which network interface gloo reaches the other nodes, where a host's own name does not tell.

gloo binds to what the host's name resolves to. Debian's installer writes 127.0.1.1 beside it into /etc/hosts, and then
no other node gets through: "connectFullMesh failed … Connection refused, remote=[127.0.1.1]".
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct

from llm.config import ConfigError
from llm.strategy.rendezvous import Rendezvous

_VARIABLE = "GLOO_SOCKET_IFNAME"
_ADDRESS_OF = 0x8915  # SIOCGIFADDR of linux/sockios.h
_log = logging.getLogger(__name__)


def choose_interface(together: Rendezvous) -> None:
    """Set GLOO_SOCKET_IFNAME where the run spans nodes, nobody has set it, and this host's name leads to itself only.

    Raises:
        ConfigError: if no interface is found by which another node is reached.
    """
    here = together.here
    if here.world_size == here.local_world_size:
        return
    mine = socket.gethostname()
    others = {name for name in together.hosts() if name != mine}  # every rank tells its own, whatever it has set
    if os.environ.get(_VARIABLE) or not others or not _is_loopback(mine):
        return
    for other in sorted(others):
        if name := _towards(other):
            os.environ[_VARIABLE] = name
            _log.info("%s resolves to itself only (127.…); gloo takes %s, by which %s is reached", mine, name, other)
            return
    raise ConfigError(
        [
            f"{_VARIABLE}: not set - {mine} resolves to 127.… in /etc/hosts, by which no other node reaches it, and no "
            f"interface was found that leads to {', '.join(sorted(others))} - export {_VARIABLE}=… in slurm/env.sh"
        ]
    )


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True  # a host that does not know itself is not reached by that name either


def _towards(host: str) -> str | None:
    """The interface whose address this machine would send from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _ADDRESS_OF, request)[20:24]
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(found) == address and not address.startswith("127."):
                return name
    return None
