"""Lightning's questions about processes, answered from the one place that knows."""

from __future__ import annotations

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from llm.launch import Place


class Environment(ClusterEnvironment):
    """The same for every launcher: Lightning's own environments start processes, requeue jobs from inside a signal
    handler, and disagree about which variable counts.
    """

    def __init__(self, here: Place) -> None:
        super().__init__()
        self.here = here
        rank_zero_only.rank = here.rank  # type: ignore[attr-defined]

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.here.address

    @property
    def main_port(self) -> int:
        return self.here.port

    @staticmethod
    def detect() -> bool:
        return False  # only ever given

    def world_size(self) -> int:
        return self.here.world_size

    def set_world_size(self, size: int) -> None:
        """Not Lightning's to decide."""

    def global_rank(self) -> int:
        return self.here.rank

    def set_global_rank(self, rank: int) -> None:
        """Not Lightning's to decide."""

    def local_rank(self) -> int:
        return self.here.local_rank

    def node_rank(self) -> int:
        return self.here.node_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        assert num_devices * num_nodes == self.here.world_size, "agree() compares them"
