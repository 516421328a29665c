#!/bin/bash
# One rank of a job: python -u FILE [ARGUMENT ...]. SIGUSR1 would end an interpreter that is just starting, and
# srun then terminates the other ranks, which looks like a cancelled job. Ignored, it reaches those that can take
# it; if there is none yet, there is nothing to save, and a job that is being preempted is requeued by Slurm.
trap '' USR1
# Triton's default cache is in the home directory, where the ranks of several nodes would compile the same
# kernels at the same time over a network file system: each node has its own, which nobody else may write
if [ -z "${TRITON_CACHE_DIR:-}" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  cache=/tmp/ibdistill-triton-$UID
  [ -d "$cache" ] || mkdir -m 700 "$cache" || true # another rank may have been faster
  [ ! -O "$cache" ] || export TRITON_CACHE_DIR=$cache
fi
exec python -u "$@"
