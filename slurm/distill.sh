#!/bin/bash
# Train, or continue, a run on a cluster; one task a GPU. From the repository's root:
#
#   sbatch [sbatch options] slurm/distill.sh RECIPE [--section.field value ...]
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 slurm/distill.sh cqa --run.dir runs/cqa
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 slurm/distill.sh demo     # nodes without GPUs
#   DRY_RUN=1 bash slurm/distill.sh cqa      # check the settings and print what would run
#
# SIGUSR1 (time limit, preemption, `scancel -s USR1 JOB`): all ranks save at the next step's end and
# the job requeues itself; the same command then continues the same run folder.
#
# The job's exit code is the highest of its ranks':
#     0  done
#     2  bad input, or no virtual environment; the log says what
#     3  diverged
#     4  restarted MAX_RESTARTS times without a new checkpoint
#    85  saved after SIGUSR1; seen only where Slurm refused to requeue
#   143  saved after SIGTERM (scancel); never requeued
#   137  a rank was killed; srun's line in the log names it
#
# Environment: IBDISTILL_VENV (see slurm/env.sh), MAX_RESTARTS (5), DRY_RUN. The log is JOBNAME-JOBID.log in the
# folder of submission, where it can always be opened, and RUN/logs/JOBID.log is a link to it.
#
# Options on sbatch's command line win over these:
#SBATCH --job-name=ibdistill
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log

set -eo pipefail
say() { echo "distill.sh: $*"; }
fail() { # CODE MESSAGE
  echo "error: ${*:2}" >&2
  exit "$1"
}
[ $# -gt 0 ] || fail 2 "no recipe; usage: sbatch [options] slurm/distill.sh RECIPE [--section.field value ...]"
[ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] || fail 2 "not in a job; use sbatch slurm/distill.sh, or DRY_RUN=1 to try"
[ -f ibdistill/train.py ] || fail 2 "$PWD is not the repository's root; submit from there"
source slurm/env.sh
set -u

if [ -n "${IBDISTILL_SWEEP:-}" ]; then # an element of slurm/sweep.sh: the settings of one line of its grid
  read -r -a element < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$IBDISTILL_SWEEP/grid.txt")
  set -- "$@" "${element[@]:1}" --run.dir "$IBDISTILL_SWEEP/${element[0]}"
fi
run=$(python slurm/preflight.py "$@")

nodes=${SLURM_JOB_NUM_NODES:-1} tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
if [ "$gpus" -gt 0 ] && [ "$gpus" -ne "$tasks" ]; then
  fail 2 "$gpus GPUs and $tasks tasks on a node; one task drives one GPU, so give --gpus-per-node=N --ntasks-per-node=N"
fi

hosts=localhost # of a dry run
[ -z "${SLURM_JOB_ID:-}" ] || hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
# its own port for each job of a shared node, below the range from which outgoing connections are served
export MASTER_PORT=$((10000 + ${SLURM_JOB_ID:-0} % 20000))
# ranks take these from Slurm; what the submitting shell had must not win
unset RANK LOCAL_RANK WORLD_SIZE
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# since Slurm 22.05 srun no longer takes this over from sbatch
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# operators that DeepSpeed compiles: the default place, in the home directory, is rebuilt whenever
# environments take turns
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${VIRTUAL_ENV:-$PWD/.venv}/torch_extensions}

# --label puts the rank before every line; a rank that fails takes the others along at once
command=(srun --kill-on-bad-exit=1 --label python -u ibdistill/train.py "$@")
if [ -n "${DRY_RUN:-}" ]; then
  say "run folder $run; $nodes nodes x $tasks ranks; would run"
  printf '  %s=%q' MASTER_ADDR "$MASTER_ADDR" MASTER_PORT "$MASTER_PORT" OMP_NUM_THREADS "$OMP_NUM_THREADS" \
    TORCH_EXTENSIONS_DIR "$TORCH_EXTENSIONS_DIR"
  printf '\n '
  printf ' %q' "${command[@]}"
  echo
  exit 0
fi

mkdir -p "$run/logs"
log=$(readlink /proc/$$/fd/1)
[ ! -f "$log" ] || ln -sf "$log" "$run/logs/$SLURM_JOB_ID.log"
say "$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $run on $SLURM_JOB_NODELIST, $nodes nodes x $tasks ranks"

# A time limit below the start-up time, or a bad node, would otherwise restart this job for ever.
newest=none
for marker in "$run"/checkpoints/step-*/complete.json; do
  [ ! -f "$marker" ] || newest=$(basename "${marker%/*}")
done
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && read -r count last < "$run/logs/restarts" && [ "$last" = "$newest" ]; then
  count=$((count + 1))
else
  count=0
fi
echo "$count $newest" > "$run/logs/restarts"
if [ "$count" -gt "${MAX_RESTARTS:-5}" ]; then
  fail 4 "$count restarts in a row without a new checkpoint (newest: $newest), so this job stops here." \
    "Look for the cause above; is --time long enough to start, train run.save_every steps and save?"
fi

code=0
"${command[@]}" || code=$?
case $code in
  0) ;;
  85 | 138) # 138: the signal came before a rank could handle it; nothing to save yet
    if scontrol requeue "$SLURM_JOB_ID"; then
      say "stopped by SIGUSR1 (exit code $code); requeued"
    else
      say "stopped by SIGUSR1 (exit code $code) and Slurm did not requeue it: submit the same command again"
    fi
    ;;
  2) say "bad input: see the line with 'error' above" ;;
  *) say "failed with exit code $code; srun's first 'error: HOST: task N' line names the rank. The same command continues from the last checkpoint" ;;
esac
exit "$code"
