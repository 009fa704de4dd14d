"""Our launchers and sweepers among Hydra's plugins."""

from __future__ import annotations

from hydra.core.plugins import Plugins

from llm.config.target import PLUGINS
from llm.sweep.local import Local
from llm.sweep.search import Optuna
from llm.sweep.slurm import Slurm


def register() -> None:
    """Hydra takes plugins only by names that begin with hydra_plugins, as of a folder that we do without: ours are
    found by such a name in its register."""
    plugins = Plugins.instance()
    for plugin in (Local, Slurm, Optuna):
        plugins.register(plugin)
        plugins.class_name_to_class[f"{PLUGINS}llm.sweep.{plugin.__name__}"] = plugin
