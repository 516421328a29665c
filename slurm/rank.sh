#!/bin/bash
# One rank of a job: python -u FILE [ARGUMENT ...]. SIGUSR1 would end an interpreter that is just starting, and
# srun then terminates the other ranks, which looks like a cancelled job. Ignored, it reaches those that can take
# it; if there is none yet, there is nothing to save, and a job that is being preempted is requeued by Slurm.
trap '' USR1
exec python -u "$@"
