#!/bin/bash
# Train, or continue, a run on a cluster; one task a GPU. From the repository's root:
#
#   sbatch [sbatch options] slurm/distill.sh RECIPE [--section.field value ...]
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 slurm/distill.sh cqa --run.dir runs/cqa
#   sbatch --nodes=2-8 --exclusive --gpus-per-node=8 slurm/distill.sh cqa  # as many as there are at each start
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
#     5  trained, but something could not be written; the same command finishes it
#     6  the teacher's server gave no answer for too long; the same command goes on
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
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log

me=distill.sh
[ -f slurm/job.sh ] || { echo "error: $PWD is not the repository's root; submit from there" >&2 && exit 2; }
source slurm/job.sh

if [ -n "${IBDISTILL_SWEEP:-}" ]; then # an element of slurm/sweep.sh: the settings of one line of its grid
  read -r -a element < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$IBDISTILL_SWEEP/grid.txt")
  source slurm/merge.sh
  merge "$@" -- "${element[@]:1}" --run.dir "$IBDISTILL_SWEEP/${element[0]}"
  set -- "${merged[@]}"
fi
run=$(python slurm/check_settings.py run "$@")
python slurm/check_inputs.py "$@"

progress() {
  local newest=none marker
  for marker in "$run"/checkpoints/step-*/complete.json; do
    [ ! -f "$marker" ] || newest=$(basename "${marker%/*}")
  done
  echo "newest checkpoint: $newest"
}
launch "$run" ibdistill/train.py "$@"
