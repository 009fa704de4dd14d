"""`python -m llm.watch PARENT RUN FIRST N_LOCAL WORLD_SIZE FLOOR_S FACTOR`: started by a run, not by hand."""

import sys
from pathlib import Path

from llm.signals import deaf
from llm.watch.sidecar import Watched, watch

if __name__ == "__main__":
    deaf()  # what ends the run ends this, too
    parent, run_dir, first, n_local, world_size, floor_s, factor = sys.argv[1:]
    watched = Watched(Path(run_dir), int(first), int(n_local), int(world_size), float(floor_s), float(factor))
    watch(watched, int(parent))
