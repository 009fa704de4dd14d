#!/usr/bin/env bash
# Nodes at once, and no queueing again. With arguments: a run in them; without: a shell, in which `train key=value …` starts one.
#   salloc --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 slurm/interactive.sh experiment=smoke strategy=ddp data.batch_size=32
#   salloc --nodes=1 --gpus-per-node=1 --cpus-per-gpu=8 slurm/interactive.sh
set -uo pipefail
# shellcheck source=slurm/job.sh
source "${LLM_CODE:-.}/slurm/job.sh" || { echo "$0: start this in the folder that has train.py" >&2 && exit 64; }
begin
if [ $# -gt 0 ]; then
  train "$@"
  exit
fi
exec bash --rcfile <(printf '%s\n' '[ -f ~/.bashrc ] && source ~/.bashrc' "source '$code/slurm/job.sh'" begin)
