"""Train a language model: `python train.py [group=choice] [key=value] …`; see README.md."""

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
    register()
    try:
        check_overrides(sys.argv[1:], Path(__file__).parent / "conf")
    except ConfigError as error:
        refuse(error)
    main()
