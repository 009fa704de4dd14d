"""Stands for train.py: with -m it composes and launches as that does; a job takes 30 ms, and leaves what a run leaves.

A job's loss is the squared distance of log10(optimizer.lr) from log10(3.2e-3). What its seed says becomes of it:
13 fails with 65, 14 leaves no metric, 15 waits until it is told to go, 16 is pruned at step 1.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"
OPTIMUM = 10**-2.5
# What of conf/train.yaml a sweep looks at: all of it takes Hydra 0.3 s for each job.
MINI = {
    "defaults": [
        {"cluster": None},
        "_self_",
        {"override hydra/job_logging": "none"},
        {"override hydra/launcher": "local"},
    ],
    "seed": 0,
    "run_name": "${run_id:}",
    "run_dir": "runs/${run_name}",
    "optimizer": {"lr": OPTIMUM, "weight_decay": 0.1},
    "model": {"dim": 32},
    "data": {},
    "callback": {},
    "hydra": {
        "output_subdir": None,
        "sweep": {"dir": "${run_dir}", "subdir": "."},
        "callbacks": {"table": {"_target_": "llm.sweep.Ending"}},
    },
}


def job(words: list[str]) -> int:
    told = dict(text.lstrip("+").split("=", 1) for text in words)
    run_dir = Path(told.get("run_dir", f"runs/{told['run_name']}").replace("'", ""))
    run_dir.mkdir(parents=True, exist_ok=True)
    seed = int(told.get("seed", "0"))
    place = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "LLM_RUN_ID")}
    place["cores"] = sorted(os.sched_getaffinity(0))
    with Path("ran").open("a") as file:
        file.write(json.dumps({"job": run_dir.name, "words": words, **place}) + "\n")
    if seed == 13:
        print("1 mistake\n  data.path: missing.jsonl - no such file")
        return 65
    if seed == 15 and not (run_dir / "saved").exists():
        received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: received.append(number))
        print("ready", flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        while not received:
            signal.pause()
        (run_dir / "saved").touch()
        end(run_dir, 130 if received[0] == signal.SIGINT else 75, "told to go")
        return 130 if received[0] == signal.SIGINT else 75
    loss = (math.log10(float(told.get("optimizer.lr", OPTIMUM))) - math.log10(OPTIMUM)) ** 2
    summary = {"steps": 2, "tokens": 64, "val/loss": loss} if seed != 14 else {"steps": 2, "train/loss": 1.0}
    (run_dir / "summary.json").write_text(json.dumps(summary | ({"pruned": 1} if seed == 16 else {})))
    end(run_dir, 0, "finished")
    return 0


def end(run_dir: Path, code: int, cause: str) -> None:
    (run_dir / "exit.json").write_text(json.dumps({"code": code, "cause": cause, "step": 2, "max_steps": 2}))


def sweep() -> None:
    import hydra
    from hydra.core.config_store import ConfigStore

    import llm.sweep
    from llm.config import register

    ConfigStore.instance().store(name="mini", node=MINI)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="mini")
    def main(cfg: object) -> None:
        raise AssertionError("a job of Hydra's own launcher")

    register()
    llm.sweep.register()
    main()


if __name__ == "__main__":
    sys.exit(sweep() if "-m" in sys.argv else job(sys.argv[1:]))
