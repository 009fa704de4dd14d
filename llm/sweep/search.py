"""Hydra's sweeper by Optuna: what to try next follows from what was found."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from llm.config.command_line import quoted
from llm.config.mistake import ConfigError, line
from llm.exit import guarded
from llm.lock import Lock, LockedError, locked
from llm.study import Pruner, Pruning, opened
from llm.submit.record import Job
from llm.sweep.launcher import Processes
from llm.sweep.outcome import Outcome
from llm.sweep.sampler import Sampler, sampler
from llm.sweep.space import Space, space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_OWNER = "process"  # attribute of a trial: which process of the sweep sees to it


class Optuna(Sweeper):
    """Draw `n_jobs` trials, run them, tell the study, and so on until there are `n_trials`.

    A trial's number is its job's. What is drawn follows from the seed, the number and the trials before it, so that a
    sweep that was killed and goes on finds what it would have found; several processes with the same command share
    the study, and each draws as it can.

    Args:
        direction: of the metric (hydra.launcher.metric).
        n_trials: in all, those of other processes and of earlier commands included.
        n_jobs: trials that are drawn, and run, together.
        sampler: tpe (Bergstra et al. 2011), cmaes (Hansen 2016), random, or grid: each combination of values once.
        seed: of the sampler.
        pruner: which jobs are ended at a validation (llm.callback.Prune); none: none.
        n_startup_trials: so many are drawn at random (tpe), and run to the end (median), first.
        warmup_steps: no job is ended before this optimizer step; of asha the first rung.
        reduction_factor: of asha.
        storage: a file that processes share; null: study.journal in the sweep's folder.
        study_name: in that file.
    """

    def __init__(
        self,
        direction: Literal["minimize", "maximize"] = "minimize",
        n_trials: Annotated[int, Ge(1)] = 20,
        n_jobs: Annotated[int, Ge(1)] = 1,
        sampler: Sampler = "tpe",
        seed: Annotated[int, Ge(0), Lt(2**32)] = 0,
        pruner: Pruner = "none",
        n_startup_trials: Annotated[int, Ge(0)] = 5,
        warmup_steps: Annotated[int, Ge(0)] = 1,
        reduction_factor: Annotated[int, Ge(2)] = 4,
        storage: str | None = None,
        study_name: str = "sweep",
    ) -> None:
        self.direction = direction
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.sampler: Sampler = sampler
        self.seed = seed
        self.pruner: Pruner = pruner
        self.n_startup_trials = n_startup_trials
        self.warmup_steps = warmup_steps
        self.reduction_factor = reduction_factor
        self.storage = storage
        self.study_name = study_name

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Who will run the jobs."""
        self.hydra_context: HydraContext = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Go on until the study has its trials, all of them with an end."""
        with guarded():
            self._installed()
            parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
            self._search(self._processes(), space(parser.parse_overrides(arguments)))

    def _search(self, launcher: Processes, found: Space) -> None:
        self.distributions = found.distributions()
        self.grid = found.grid() if self.sampler == "grid" else []
        self.n_trials = min(self.n_trials, len(self.grid)) if self.grid else self.n_trials
        folder = launcher.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "multirun.yaml").write_text(OmegaConf.to_yaml(self.config))
        study, owner = self._study(folder, launcher.metric), folder / ".processes" / secrets.token_hex(4)
        launcher.direction = self.direction
        with locked(owner):
            while trials := self._next(study, owner):
                for outcome in launcher.run([Job(trial.number, self._overrides(found, trial)) for trial in trials]):
                    _tell(study, outcome)
        shutil.rmtree(owner)
        with contextlib.suppress(OSError):  # another process has one
            owner.parent.rmdir()

    def _study(self, folder: Path, metric: str) -> Study:
        """The study, which is made if it is not there.

        Raises:
            ConfigError: if it is there, and is about something else.
        """
        from optuna import create_study

        self.file = str(self.storage or folder / "study.journal")
        name = self.study_name
        study = create_study(storage=opened(self.file), study_name=name, direction=self.direction, load_if_exists=True)
        mine = {
            "metric": metric,
            "direction": self.direction,
            "keys": {k: str(d) for k, d in self.distributions.items()},
        }
        before = mine | {"direction": study.direction.name.lower()} | study.user_attrs.get("about", {})
        if differ := [key for key in mine if mine[key] != before[key]]:
            told, rule = (" ".join(f"{key}={there[key]}" for key in differ) for there in (mine, before))
            remedy = "go on with the same command, or give another run_name"
            raise ConfigError([line(self.file, told, f"study {name} has {rule}", remedy)])
        study.set_user_attr("about", mine)
        Pruning(metric, self.pruner, self.n_startup_trials, self.warmup_steps, self.reduction_factor).write(study)
        return study

    def _next(self, study: Study, owner: Path) -> list[FrozenTrial]:
        """The trials of a process that is gone, and as many new ones as make the batch full."""
        left = [trial for trial in _in_state(study, "RUNNING") if _is_left(trial)]
        found = [trial for trial in left if self._adopted(study, trial, owner)]
        while (n_drawn := len(study.get_trials(deepcopy=False)) - len(_in_state(study, "WAITING"))) < self.n_trials:
            if found and n_drawn % self.n_jobs == 0:
                break
            if not _in_state(study, "WAITING"):
                study.enqueue_trial({}, user_attrs={_OWNER: str(owner)})  # it has an owner from the first moment on
            study.sampler = sampler(self.sampler, self.seed, n_drawn, self.n_startup_trials, self.grid)
            asked = study.ask(self.distributions)
            asked.set_user_attr(_OWNER, str(owner))  # it may have been another's that waited
            found.append(study.get_trials(deepcopy=False)[asked.number])
        return found

    def _adopted(self, study: Study, trial: FrozenTrial, owner: Path) -> bool:
        """Make a trial this process's; one that was being drawn when its process was killed has no job, and failed."""
        from optuna.trial import Trial, TrialState

        if set(trial.params) != set(self.distributions):
            study.tell(trial.number, state=TrialState.FAIL)
            return False
        Trial(study, trial._trial_id).set_user_attr(_OWNER, str(owner))
        return True

    def _overrides(self, found: Space, trial: FrozenTrial) -> list[str]:
        """Of a trial's job, with the callback that reports if there is somebody to judge."""
        overrides = found.overrides(trial.params)
        if self.pruner == "none":
            return overrides
        values = {"storage": self.file, "study": self.study_name, "trial": trial.number}
        told = ",".join(f"{name}:{quoted(value)}" for name, value in values.items())
        return [*overrides, f"+callback.prune={{_target_:llm.callback.Prune,{told}}}"]

    def _installed(self) -> None:
        wanted = ("optuna", "cmaes") if self.sampler == "cmaes" else ("optuna",)
        if missing := [name for name in wanted if find_spec(name) is None]:
            rule = f"{' and '.join(missing)} is not installed"
            raise ConfigError([line("hydra/sweeper", "optuna", rule, "pip install -e '.[sweep]'")])

    def _processes(self) -> Processes:
        if isinstance(self.launcher, Processes):
            return self.launcher
        rule = "hydra/sweeper=optuna needs jobs with processes of their own"
        raise ConfigError([line("hydra/launcher", type(self.launcher).__name__, rule, "local or slurm")])


def _in_state(study: Study, state: str) -> list[FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == state]


def _is_left(trial: FrozenTrial) -> bool:
    """Whether the process that drew a trial is gone."""
    lock = Lock(trial.user_attrs[_OWNER])
    try:
        lock.take()
    except LockedError:
        return False
    lock.release()
    return True


def _tell(study: Study, outcome: Outcome) -> None:
    """What became of a trial. One that was interrupted stays open, for the command that goes on with it."""
    from optuna.trial import TrialState

    if outcome.status == "finished":
        study.tell(outcome.number, outcome.metric, skip_if_finished=True)
    elif outcome.status in ("pruned", "failed"):
        state = TrialState.PRUNED if outcome.status == "pruned" else TrialState.FAIL
        study.tell(outcome.number, state=state, skip_if_finished=True)
