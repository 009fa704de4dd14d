"""Starting the processes of a run, and knowing which of them this one is. Nothing here loads torch.

place()                                                  # rank, world size, and where they meet
n = ranks_to_start(cfg, place())                         # 0: this process runs it
launch(job_command(), n, run_dir=cfg.run_dir)            # else it starts n ranks and waits
"""

from llm.launch.job import arguments_of_job, job_arguments, job_command, program, ranks_to_start
from llm.launch.launcher import die_with_launcher, die_with_parent, launch, signal_numbers
from llm.launch.place import Place, place

__all__ = [
    "Place",
    "arguments_of_job",
    "die_with_launcher",
    "die_with_parent",
    "job_arguments",
    "job_command",
    "launch",
    "place",
    "program",
    "ranks_to_start",
    "signal_numbers",
]
