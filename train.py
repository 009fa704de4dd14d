"""Train a language model: `python train.py [group=choice] [key=value] …`; see README.md."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from llm.config import ConfigError, check_overrides, refuse, register


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """One run, or with -m one run for each combination."""
    from llm.run import main as run  # torch and lightning load only for a command line without mistakes

    run(cfg)


if __name__ == "__main__":
    # Threads that wait for each other by spinning starve each other as soon as another program wants a core: on two
    # cores of a busy machine the main job ran at 800 to 2,300 tokens/s with spinning and at 3,300 to 5,800 without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    register()
    try:
        check_overrides(sys.argv[1:], Path(__file__).parent / "conf")
        main()
    except ConfigError as error:
        refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)  # before there was anything to save
