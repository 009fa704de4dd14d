"""Train a language model: `python train.py [group=choice] [key=value] …`; see README.md."""

from llm.signals import listen, raise_at_once

if __name__ == "__main__":
    listen()  # before the imports: they take a while, and who is told meanwhile leaves as well as later

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from llm.config import ConfigError, check_overrides, given_run_id, job_run_id, refuse, register
from llm.exit import STAND_BACK_S, as_rank, guarded, stand_back
from llm.launch import die_with_launcher, job_command, launch, place, ranks_to_start
from llm.sweep import register as register_sweeps

CONF = Path(__file__).parent / "conf"
NAMED = given_run_id() is not None  # from outside, before composing a configuration makes a name


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """One run: here, or in ranks that are started for it. With -m a launcher of llm.sweep starts this for each."""
    with guarded():
        n_ranks, n_nodes = ranks_to_start(cfg, place()), cfg.trainer.num_nodes
        if n_ranks > 0:
            raise_at_once()  # nothing has been started; afterwards ranks are told
            run_id = job_run_id() if NAMED or n_nodes == 1 else None
            code = launch(job_command(), n_ranks, run_dir=cfg.run_dir, n_nodes=n_nodes, run_id=run_id)
            if code != 0:
                sys.exit(code)
            return
    from llm.run import main as run  # torch and lightning load only for a command line without mistakes

    run(cfg)


def start() -> None:
    """Refuse what is wrong before anything is started; know which process this is before the run gets its name."""
    here = place()
    as_rank(here.rank, here.world_size, watched=here.launcher == "launch")
    if here.world_size > 1 and not NAMED:
        from llm.strategy import share_run_id

        share_run_id(here)
    try:
        check_overrides(sys.argv[1:], CONF, elsewhere=lambda cfg: ranks_to_start(cfg, here) > 0)
    except ConfigError as error:
        if here.rank > 0:  # rank 0 has the same command line; our launcher lets it speak
            stand_back(error.exit_code, 0 if here.launcher == "launch" else STAND_BACK_S)
        raise
    main()


if __name__ == "__main__":
    # Threads that wait for each other by spinning starve each other as soon as another program wants a core: on two
    # cores of a busy machine the main job ran at 800 to 2,300 tokens/s with spinning and at 3,300 to 5,800 without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # When rank 0 is gone, c10d prints thirty lines of C++ in each of the others, and the reason is lost among them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    die_with_launcher()
    register()
    register_sweeps()
    with guarded():  # which waits for an orderly end where there is something to end, unlike `refuse`
        try:
            start()
        except ConfigError as error:
            refuse(error)
