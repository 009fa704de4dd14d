"""Whether W&B can be talked to, found out in a moment: `wandb.init` blocks 91 s on a server that does not answer."""

from __future__ import annotations

import functools
import netrc
import os
import socket
import sys
from urllib.parse import urlsplit

_DEFAULT_SERVER = "https://api.wandb.ai"
_PATIENCE_S = 2.0


@functools.cache
def wandb_offline() -> bool:
    """False if WANDB_MODE asks for online, or a key is configured (variable or `wandb login`) and the server answers.

    An offline run writes the same files, and `wandb sync` sends them later: training never waits for a network.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return mode != "online"
    server = urlsplit(os.environ.get("WANDB_BASE_URL", _DEFAULT_SERVER))
    host = server.hostname or ""
    if not (os.environ.get("WANDB_API_KEY") or _logged_in(host)):
        return True
    try:
        socket.create_connection((host, server.port or 443), timeout=_PATIENCE_S).close()
    except OSError as error:
        print(f"W&B: {host} does not answer ({error}); this run is recorded offline", file=sys.stderr)
        return True
    return False


def _logged_in(host: str) -> bool:
    """Whether `wandb login` left a key for `host`."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
