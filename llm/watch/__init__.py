"""Telling a hung step from a long one, from outside: a sidecar on each node watches the hearts of the node's ranks.

It is a process of its own, since a rank that hangs may hold the interpreter's lock, or be stopped.
"""

from llm.watch.heart import Heart
from llm.watch.sidecar import start_sidecar

__all__ = ["Heart", "start_sidecar"]
