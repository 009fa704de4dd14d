# shellcheck shell=bash
# What the templates share. Nothing in here is a site's own: that is env.sh.

code=${LLM_CODE:-.} # the folder with train.py, conf/, llm/ and slurm/
# shellcheck source=slurm/env.sh
source "$code/slurm/env.sh" || exit 64

readonly SAVED=75 LOST=76 MISTAKE=64 # exit codes of a run (docs/parallel.md)
told=0                               # whether somebody told this shell to go
ended=0                              # whether that was SIGTERM: SLURM ends all processes of the job
heard=0                              # the same, since it waits
step=0                               # the process id of srun while ranks run

fail() {
  echo "$0: $*" >&2
  exit "$MISTAKE"
}

# Before anything else: which attempt this is, what every process needs, and who hears signals.
begin() {
  local restart=${SLURM_RESTART_COUNT:-0}
  echo "== job ${SLURM_JOB_ID:?start this with sbatch or salloc}, restart $restart, ${SLURM_JOB_NODELIST:-}, $(date '+%F %T')"
  [ -f "$code/train.py" ] || fail "no train.py in $(cd "$code" && pwd) - run sbatch in the folder that has it"
  command -v python >/dev/null || fail "no python on $(hostname) - activate an environment before sbatch, or in slurm/env.sh"
  # sbatch's --signal and scancel reach the ranks themselves; what reaches this shell only, it passes on.
  trap hear USR1 USR2
  trap 'ended=1; hear' TERM
  open_container
  per_node=$(ranks_per_node) || exit "$MISTAKE"
  # The template's --cpus-per-gpu is for nodes that have any: on others srun would look for them.
  [ -n "${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}" ] || unset SLURM_CPUS_PER_GPU
  # Each rank would take every core of its node, and all of them wait for each other.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-$(nproc)} + per_node - 1) / per_node))}
  # Errors of NCCL with their causes; INFO also tells which network it took.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Memory that fragments grows instead of failing: packed rows need blocks of varying size.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # The log says a line when it is written, not when 8 KiB of it are.
  export PYTHONUNBUFFERED=1
  # Ranks meet on the first node of the step, at a port that follows from job and step; set both to have it otherwise.
  # export MASTER_ADDR=… MASTER_PORT=…
}

# What starts a command in the container of env.sh, if there is one: `inside` before the command, or `pyxis`, options of srun.
open_container() {
  inside=() pyxis=()
  case ${LLM_CONTAINER:-} in
    '') ;;
    *.sif) inside=(apptainer exec --nv --bind "$PWD${LLM_CONTAINER_MOUNTS:+,$LLM_CONTAINER_MOUNTS}" "$LLM_CONTAINER") ;;
    *)
      local mounts="$PWD:$PWD" folder
      for folder in ${LLM_CONTAINER_MOUNTS//,/ }; do mounts+=",$folder:$folder"; done
      pyxis=(--container-image="$LLM_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
      ;;
  esac
}

# `python -m llm` of this code, once.
llm() {
  local command=("${inside[@]}" env PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" python -m llm "$@")
  [ ${#pyxis[@]} = 0 ] || command=(srun --nodes=1 --ntasks=1 --overlap "${pyxis[@]}" "${command[@]}")
  "${command[@]}"
}

# As many as were asked for; else one for each GPU, else one.
ranks_per_node() {
  local tasks=${SLURM_NTASKS_PER_NODE:-} gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
  gpus=${gpus##*:} # of h100:8
  [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || tasks=${tasks:-${SLURM_NTASKS:-}}
  if [ -z "$tasks$gpus" ] && [ "${SLURM_NTASKS:-1}" -gt "$SLURM_JOB_NUM_NODES" ]; then
    echo "--ntasks=$SLURM_NTASKS - says nothing of each node - give --ntasks-per-node, or --gpus-per-node" >&2
    return 1
  fi
  if [ -n "$tasks" ] && [ -n "$gpus" ] && [ "$tasks" != "$gpus" ]; then
    echo "--ntasks-per-node=$tasks - a node has $gpus GPUs, and each is one rank's - give --ntasks-per-node=$gpus, or leave it out" >&2
    return 1
  fi
  echo "${tasks:-${gpus:-1}}"
}

hear() {
  told=1 heard=1
  # Which srun passes on to the ranks, that save and leave; told SIGTERM it would end them at once.
  [ "$step" = 0 ] || kill -s USR1 "$step" 2>/dev/null
}

# Run a command as the ranks of this job, and give its exit code: the highest of a rank.
ranks() {
  [ "$told" = 0 ] || return "$SAVED" # before anything was started there is nothing to save
  local options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --ntasks-per-node="$per_node")
  options+=(--distribution=block) # neighbours share a node: the tensor axis is laid over them
  options+=(--kill-on-bad-exit=1) # a rank that hangs does not keep the job
  # Without --gpu-bind each rank sees the GPUs of its node, and takes its own; =none hides them all where SLURM does not confine
  # devices (22.05).
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun asks no more by itself since 22.05
  srun "${options[@]}" "${pyxis[@]}" "${inside[@]}" "$@" &
  step=$!
  local result=0 status
  while heard=0; do
    wait "$step"
    status=$?
    [ "$status" = 127 ] || result=$status # 127: a signal came when all had been waited for already
    [ "$heard" = 1 ] || break             # else the signal ended `wait`, not srun
  done
  step=0
  return "$result"
}

# Copy the prepared data to the own disk of each node, and have it read from there.
stage() {
  [ -n "${LLM_SCRATCH:-}" ] || return 0
  local from=${LLM_CACHE_DIR:-$HOME/.cache/llm-on-lightning}
  [ -d "$from" ] || fail "LLM_SCRATCH=$LLM_SCRATCH - there is nothing in $from to copy - sbatch slurm/prepare.sbatch first"
  local copy="mkdir -p '$LLM_SCRATCH' && cp -ru '$from/.' '$LLM_SCRATCH'"
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 sh -c "$copy" || exit
  export LLM_CACHE_DIR=$LLM_SCRATCH
}

# The command line of a run in this allocation: what was allocated, then what the user says.
train() {
  local allocated=(trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$per_node") run_dir before code_of_run
  # One process looks at the configuration before a thousand do; a mistake ends the job here.
  run_dir=$(llm where "${allocated[@]}" "$@") || return
  echo "== $run_dir"
  stage
  before=$(ending "$run_dir")
  ranks python "$code/train.py" "${allocated[@]}" "$@"
  code_of_run=$?
  # srun gives the highest code of a rank, 137 of those that it killed itself; the run has written down the first.
  if [ -f "$run_dir/exit.json" ] && [ "$(ending "$run_dir")" != "$before" ]; then
    code_of_run=$(sed -n 's/^{"code": \([0-9]*\).*/\1/p' "$run_dir/exit.json")
  fi
  echo "== exit code $code_of_run"
  return "$code_of_run"
}

ending() { stat --format='%i %Y' "$1/exit.json" 2>/dev/null; }

# Queue this job again if that is what its exit code asks for, and leave with the code.
finish() {
  local result=$1 restarts=${SLURM_RESTART_COUNT:-0} most=${LLM_MAX_REQUEUES:-100}
  case $result in
    "$SAVED" | "$LOST" | 138 | 140) ;; # 138, 140: SIGUSR1 and 2 came before Python could hear them
    # Preempted, with time to go: SLURM sends SIGTERM to all processes, of which srun kills the ranks.
    128 | 129 | 13? | 14?) [ "$ended" = 1 ] || exit "$result" ;;
    *) exit "$result" ;;
  esac
  [ ! -e "$code/../cancelled" ] || exit "$result" # python -m llm cancel
  # Whoever cancels a job does not want it back, and what SLURM itself queues again is no longer running either.
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null)" = RUNNING ] || exit "$result"
  if [ "$restarts" -ge "$most" ]; then
    echo "== $restarts restarts are enough (LLM_MAX_REQUEUES, cluster.max_requeues) - sbatch the same command to go on" >&2
    exit "$result"
  fi
  echo "== queued again"
  scontrol requeue "$SLURM_JOB_ID" || echo "== that was refused - sbatch the same command to go on" >&2
  exit "$result"
}
