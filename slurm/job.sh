# shellcheck shell=bash
# What the templates share. Nothing in here is a site's own: that is env.sh.

code=${LLM_CODE:-.}           # the folder with train.py, conf/, llm/ and slurm/
notes=${LLM_JOB_FOLDER:-$PWD} # where this job's own notes lie
readonly SAVED=75 LOST=76 MISTAKE=64 BUG=70 # exit codes of a run (docs/parallel.md)
readonly IN_A_ROW=3                         # so often a job may end before its run begins
told=0                                      # whether somebody told this shell to go
ended=0                                     # whether that was SIGTERM: SLURM ends all processes of the job
heard=0                                     # the same as told, since this shell waits
began=0                                     # whether the run came to its beginning in this attempt
step=0                                      # the process id of srun while ranks run

hear() {
  told=1 heard=1
  # Which srun passes on to the ranks, that save and leave; told SIGTERM it would end them at once.
  [ "$step" = 0 ] || kill -s USR1 "$step" 2>/dev/null
}
# sbatch's --signal and scancel reach the ranks themselves; what reaches this shell only, it passes on.
trap hear USR1 USR2
trap 'ended=1; hear' TERM

fail() {
  echo "slurm/job.sh: $*" >&2
  exit "$MISTAKE"
}

# A site's file may end with a test that fails, and activate what does not know `set -u`.
[ -r "$code/slurm/env.sh" ] || fail "no slurm/env.sh in $code"
set +u
# shellcheck source=slurm/env.sh
source "$code/slurm/env.sh" || :
set -u

# Before anything else: which attempt this is, and what every process needs.
begin() {
  local restart=${SLURM_RESTART_COUNT:-0}
  echo "== job ${SLURM_JOB_ID:?start this with sbatch or salloc}, restart $restart, ${SLURM_JOB_NODELIST:-}, $(date '+%F %T')"
  [ -f "$code/train.py" ] || fail "no train.py in $(cd "$code" && pwd) - run sbatch in the folder that has it"
  [ -n "${LLM_CONTAINER:-}" ] || command -v python >/dev/null ||
    fail "no python on $(hostname) - activate an environment before sbatch, or in slurm/env.sh"
  # Ranks get what env.sh sets also where sbatch was told --export=NONE, which srun would take over.
  export SLURM_EXPORT_ENV=ALL
  # Errors of NCCL with their causes; INFO also tells which network it took.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Memory that fragments grows instead of failing: packed rows need blocks of varying size.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # The log says a line when it is written, not when 8 KiB of it are.
  export PYTHONUNBUFFERED=1
  # Ranks meet on the first node of the step, at a port that follows from job and step; set both to have it otherwise.
  # export MASTER_ADDR=… MASTER_PORT=…
  open_container
}

# What starts a command in the container of env.sh, if there is one: `inside` before the command, or `pyxis`, options of srun.
open_container() {
  inside=() pyxis=()
  local folders=("$PWD" "$(cd "$code" && pwd)" "${LLM_CACHE_DIR:-$HOME/.cache}") own folder mounts=
  IFS=, read -ra own <<<"${LLM_CONTAINER_MOUNTS:-}"
  for folder in "${folders[@]}" "${own[@]}" ${LLM_SCRATCH:+"$LLM_SCRATCH"}; do mounts+="${mounts:+,}$folder:$folder"; done
  case ${LLM_CONTAINER:-} in
    '') ;;
    *.sif) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$LLM_CONTAINER") ;;
    *) pyxis=(--container-image="$LLM_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
  esac
}

# `python -m llm` of this code, once: without -P it would be that of the folder the job was submitted from.
llm() {
  local command=("${inside[@]}" env PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" python -P -m llm "$@")
  [ ${#pyxis[@]} = 0 ] ||
    command=(srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --overlap "${pyxis[@]}" "${command[@]}")
  "${command[@]}"
}

# As many as were asked for; else one for each GPU that was, else one.
ranks_per_node() {
  local tasks=${SLURM_NTASKS_PER_NODE:-} asked=${SLURM_GPUS_PER_NODE:-} there=${SLURM_GPUS_ON_NODE:-}
  asked=${asked##*:} # of h100:8
  [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || tasks=${tasks:-${SLURM_NTASKS:-}}
  if [ -z "$tasks$asked$there" ] && [ -n "${SLURM_GPUS:-}" ]; then
    echo "--gpus=$SLURM_GPUS - says nothing of each node here - give --gpus-per-node" >&2
    return 1
  fi
  if [ -z "$tasks$asked$there" ] && [ "${SLURM_NTASKS:-1}" -gt "$SLURM_JOB_NUM_NODES" ]; then
    echo "--ntasks=$SLURM_NTASKS - says nothing of each node - give --ntasks-per-node, or --gpus-per-node" >&2
    return 1
  fi
  if [ -n "$tasks" ] && [ -n "$asked" ] && [ "$tasks" != "$asked" ]; then
    echo "--ntasks-per-node=$tasks - each of the node's $asked GPUs is one rank's - give --ntasks-per-node=$asked, or leave it out" >&2
    return 1
  fi
  echo "${tasks:-${asked:-${there:-1}}}"
}

# Run a command as the ranks of this job, and give its exit code: the highest of a rank.
ranks() {
  local options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --ntasks-per-node="$per_node")
  options+=(--distribution=block) # neighbours share a node: the tensor axis is laid over them
  options+=(--kill-on-bad-exit=1) # a rank that hangs does not keep the job
  options+=(--input=none)         # none of them reads
  # Without --gpu-bind each rank sees the GPUs of its node, and takes its own; =none hides them all where SLURM does not confine
  # devices (22.05), and of --gpus-per-task each would see one.
  unset SLURM_GPUS_PER_TASK
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun asks no more by itself since 22.05
  if [[ $- = *i* ]]; then # of somebody at a terminal, whose Ctrl-C is for srun
    srun "${options[@]}" "${pyxis[@]}" "${inside[@]}" "$@"
    return
  fi
  [ "$told" = 0 ] || return "$SAVED" # before anything was started there is nothing to save
  srun "${options[@]}" "${pyxis[@]}" "${inside[@]}" "$@" &
  step=$!
  [ "$told" = 0 ] || kill -s USR1 "$step" # who was told between these lines
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

# Run what the user says in what was allocated; gives the exit code of the run.
train() {
  local run_dir before begun result
  [ ! -e "$notes/cancelled" ] || return "$SAVED" # while it was on its way back into the queue
  per_node=$(ranks_per_node) || return "$MISTAKE"
  # The templates' --cpus-per-gpu is for nodes that have any: on others srun would look for them.
  [ -n "${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}" ] || unset SLURM_CPUS_PER_GPU
  # Each rank would take every core of its node, and all of them wait for each other.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-$(nproc)} + per_node - 1) / per_node))}
  local run=("$@" trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$per_node")
  # One process looks at the configuration before a thousand do; a mistake ends the job here.
  run_dir=$(llm where "${run[@]}") || return
  echo "== $run_dir"
  if [ -n "${LLM_SCRATCH:-}" ]; then
    staged "${run[@]}" || return
    run+=(data.cache_dir="$LLM_SCRATCH")
  fi
  before=$(ending "$run_dir") begun=$(beginnings "$run_dir")
  ranks python "$code/train.py" "${run[@]}"
  result=$?
  # srun gives the highest code of a rank, 137 of those that it killed itself; the run has written down the first.
  if [ -f "$run_dir/exit.json" ] && [ "$(ending "$run_dir")" != "$before" ]; then
    result=$(sed -n 's/^{"code": \([0-9]*\).*/\1/p' "$run_dir/exit.json")
  fi
  [ "$(beginnings "$run_dir")" = "$begun" ] || began=1
  echo "== exit code $result"
  return "$result"
}

ending() { stat --format='%i %Y' "$1/exit.json" 2>/dev/null; }
beginnings() { grep -c '"begin"' "$1/attempts.jsonl" 2>/dev/null; }

# Have the data that a run reads on the own disk of each node.
staged() {
  local each=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --input=none)
  local command=(env PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" python -P -m llm stage "$LLM_SCRATCH" "$@")
  srun "${each[@]}" "${pyxis[@]}" "${inside[@]}" "${command[@]}"
}

# Queue this job again if that is what its exit code asks for, and leave with the code.
finish() {
  local result=$1 restarts=${SLURM_RESTART_COUNT:-0} most=${LLM_MAX_REQUEUES:-100} id=$SLURM_JOB_ID
  # The id of an array's last task is that of the whole array.
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  case $result in
    "$SAVED" | "$LOST" | 138 | 140) ;; # 138, 140: SIGUSR1 and 2 came before Python could hear them
    # None of a run's own, so somebody else has ended it. Preempted, with time to go: SLURM sends SIGTERM to all processes, of which
    # srun kills the ranks. Before the run began: SLURM ends on a node that is back what it had lost there, or does not reach it
    # yet. With --no-kill: srun kills the ranks that are left.
    12[89] | 1[3-9]? | 2??) [ "$ended" = 1 ] || [ "$began" = 0 ] || lost_node || exit "$result" ;;
    *) exit "$result" ;;
  esac
  [ ! -e "$notes/cancelled" ] || exit "$result" # python -m llm cancel
  # Whoever cancels a job does not want it back, and what SLURM itself queues again is no longer running either.
  [ "$(state_of "$id")" = RUNNING ] || exit "$result"
  ! stalled || exit "$BUG"
  if [ "$restarts" -ge "$most" ]; then
    echo "== $restarts restarts are enough (LLM_MAX_REQUEUES, cluster.max_requeues) - sbatch the same command to go on" >&2
    exit "$result"
  fi
  echo "== queued again"
  patiently scontrol requeue "$id" || echo "== that was refused - sbatch the same command to go on" >&2
  exit "$result"
}

# Whether one of the job's nodes is gone.
lost_node() {
  [ -n "$(sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --states=down,fail,no_respond --format=%N 2>/dev/null)" ]
}

# Whether this job has ended before its run began too often: what it meets every time will not go away by itself. (Of attempts
# that begin, llm/attempts.py sees to it.)
stalled() {
  local file=$notes/slurm-$SLURM_JOB_ID.stalls so_far=1
  if [ "$began" = 1 ]; then
    rm -f "$file"
    return 1
  fi
  [ ! -e "$file" ] || so_far=$(($(cat "$file") + 1))
  echo "$so_far" >"$file"
  [ "$so_far" -ge "$IN_A_ROW" ] || return 1
  echo "== $so_far attempts in a row ended before the run began - mend what this log says, and submit it anew" >&2
}

# What SLURM calls a job; RUNNING if it does not answer: then that is the likeliest.
state_of() {
  local state
  state=$(patiently squeue --noheader --jobs="$1" --format=%T) || state=RUNNING
  echo "${state:-ended}"
}

# A command of SLURM's, again for two minutes while the controller is away.
patiently() {
  local tries
  for tries in 1 2 3 4 5 6 7 8; do
    "$@" && return
    [ "$tries" = 8 ] || sleep 15
  done
  return 1
}
