# shellcheck shell=bash
# Sourced by the job scripts beside it, from the repository's root (Slurm runs a copy of a submitted script,
# from its own folder, but in the folder of submission): all that is around the ranks. The script has set
# `me` to its name, calls preflight, defines `progress`, and ends with `launch`.
set -eo pipefail
say() { echo "${me:?}: $*"; }
fail() { # CODE MESSAGE
  echo "error: ${*:2}" >&2
  exit "$1"
}
[ $# -gt 0 ] || fail 2 "no recipe; usage: sbatch [options] slurm/$me RECIPE [--section.field value ...]"
[ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] || fail 2 "not in a job; use sbatch slurm/$me, or DRY_RUN=1 to try"
source slurm/env.sh
set -u

# `scontrol requeue` takes the number of an array's last element for the whole array
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}

launch() { # FOLDER PROGRAM [ARGUMENT ...]: run it, one task a GPU, and end with its exit code
  local folder=$1
  shift
  local nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-0} cpus=${SLURM_CPUS_PER_TASK:-1}
  local tasks=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
  if [ "$gpus" -gt 0 ] && [ "$gpus" -ne "$tasks" ] || [ $((tasks * cpus)) -gt "${SLURM_CPUS_ON_NODE:-$((tasks * cpus))}" ]; then
    fail 2 "$gpus GPUs, $tasks tasks and ${SLURM_CPUS_ON_NODE:-?} CPUs on a node; one task drives one GPU and has" \
      "--cpus-per-task=$cpus, so give --gpus-per-node=N and either --ntasks-per-node=N or --exclusive"
  fi

  local hosts=localhost # of a dry run
  [ -z "$job" ] || hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts%%$'\n'*}
  # its own port for each job of a shared node, below the range from which outgoing connections are served
  export MASTER_PORT=$((10000 + ${SLURM_JOB_ID:-0} % 20000))
  # ranks take these from Slurm; what the submitting shell had must not win
  unset RANK LOCAL_RANK WORLD_SIZE
  export OMP_NUM_THREADS=$cpus
  # since Slurm 22.05 srun no longer takes this over from sbatch
  export SRUN_CPUS_PER_TASK=$cpus
  # what DeepSpeed compiles (for NVMe offload): the default place, in the home directory, is rebuilt whenever
  # environments take turns
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${VIRTUAL_ENV:-$PWD/.venv}/torch_extensions}

  # --label puts the rank before every line; a rank that fails takes the others along at once
  local command=(srun --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --kill-on-bad-exit=1 --label bash slurm/rank.sh "$@")
  if [ -n "${DRY_RUN:-}" ]; then
    say "folder $folder; $nodes nodes x $tasks ranks; would run"
    printf '  %s=%q' MASTER_ADDR "$MASTER_ADDR" MASTER_PORT "$MASTER_PORT" OMP_NUM_THREADS "$OMP_NUM_THREADS"
    printf '\n '
    printf ' %q' "${command[@]}"
    echo
    exit 0
  fi

  mkdir -p "$folder/logs"
  local log
  log=$(readlink /proc/$$/fd/1)
  [ ! -f "$log" ] || ln -sf "$log" "$folder/logs/$SLURM_JOB_ID.log"
  say "$(date '+%F %T') job $job, restart ${SLURM_RESTART_COUNT:-0}: $folder on $SLURM_JOB_NODELIST, $nodes nodes x $tasks ranks"
  guard "$folder/logs/restarts-$SLURM_JOB_ID"

  local code=0
  "${command[@]}" || code=$?
  case $code in
    0) ;;
    85)
      say "stopped by SIGUSR1 (exit code $code); requeueing" # said first, since Slurm ends this script when it does
      scontrol requeue "$job" || say "Slurm did not requeue it: submit the same command again"
      ;;
    5) say "trained, but not everything could be written: see the lines with 'error' above; the same command finishes it" ;;
    6) say "the teacher's server gave no answer for too long; the same command goes on once it does" ;;
    2) say "bad input: see the line with 'error' above" ;;
    *)
      say "failed with exit code $code; srun's first 'error: HOST: task N' line names the rank. The same command" \
        "goes on from what is saved"
      ;;
  esac
  exit "$code"
}

guard() { # FILE: stop a job that restarts without progress, as for a time limit below the start-up time
  local count last newest
  newest=$(progress)
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && read -r count last < "$1" && [ "$last" = "$newest" ]; then
    count=$((count + 1))
  else
    count=0
  fi
  echo "$count $newest" > "$1"
  if [ "$count" -gt "${MAX_RESTARTS:-5}" ]; then
    fail 4 "$count restarts in a row without progress ($newest), so this job stops here. Look for the cause" \
      "above; is --time long enough to start, work and save?"
  fi
}
