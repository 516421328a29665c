#!/bin/bash
# Let the teacher write rationales for a run's training records, before the run; one task a GPU. From the
# repository's root, with the settings of the run:
#
#   sbatch [sbatch options] slurm/rationales.sh RECIPE --teacher.rationales all --teacher.model M \
#     --teacher.placement replica [--teacher.rationale_cache FOLDER] [--section.field value ...]
#   sbatch --array=0-15%8 ...      # 16 elements share the records, at most 8 at a time
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 ... --teacher.placement zero3    # one large teacher
#   DRY_RUN=1 bash slurm/rationales.sh ...      # check the settings and print what would run
#
# An array where a node, or a part of it, holds the teacher: its elements start as GPUs become free and none
# waits for another. One job on several nodes where it must be sharded over them.
#
# The texts go to teacher.rationale_cache, or else RUN/rationales, where the run finds them; with
# --teacher.placement cache it needs no teacher. What is written stays: after a failure the same command asks
# only about what is missing, whether as the same array, as another one or as one job. SIGUSR1 (time limit, preemption,
# `scancel -s USR1 JOB`): all ranks finish the batch under way (teacher.write_batch_size records) and the job
# requeues itself.
#
# The job's exit code is the highest of its ranks':
#     0  done: all of the job's, or the element's, share is written
#     2  bad input, or no virtual environment; the log says what
#     4  restarted MAX_RESTARTS times without a new text
#     6  the teacher's server gave no answer for too long; the same command goes on
#    85  stopped by SIGUSR1; seen only where Slurm refused to requeue
#   143  stopped by SIGTERM (scancel); never requeued
#   137  a rank was killed; srun's line in the log names it
#
# Environment: as of slurm/distill.sh. The log is JOBNAME-JOBID.log in the folder of submission, and
# FOLDER/logs/JOBID.log is a link to it.
#
# Options on sbatch's command line win over these:
#SBATCH --job-name=ibdistill-rationales
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log

me=rationales.sh
[ -f slurm/job.sh ] || { echo "error: $PWD is not the repository's root; submit from there" >&2 && exit 2; }
source slurm/job.sh

texts=$(python slurm/check_settings.py rationales "$@")
python slurm/check_inputs.py "$@"
elements=${SLURM_ARRAY_TASK_COUNT:-1} element=${SLURM_ARRAY_TASK_ID:-0}
if [ "${SLURM_ARRAY_TASK_MIN:-0}" -ne 0 ] || [ "${SLURM_ARRAY_TASK_MAX:-0}" -ne $((elements - 1)) ]; then
  fail 2 "the array's elements are numbered $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX, but $elements share the" \
    "records: give --array=0-$((elements - 1)), or the same array as before; what is written is not asked again"
fi

progress() {
  local file lines=0
  for file in "$texts"/rank-*.jsonl; do
    [ ! -f "$file" ] || lines=$((lines + $(wc -l < "$file")))
  done
  echo "texts: $lines"
}
launch "$texts" ibdistill/write_rationales.py "$@" --part "$element/$elements"
