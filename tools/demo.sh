#!/usr/bin/env bash
# The main job end to end on the embedded corpus, with 2 processes, or 1 where there is a single GPU:
#   pretrain   a tiny T5, the stand-in for a downloaded one; teacher and students start from it
#   teacher    learns from all 16,000 labelled problems, both streams
#   students   learn from 300: finetune, dss, and ib with the teacher in the job, sharded by ZeRO-3
# What is finished is not run again: `rm -r runs/demo` starts over. Arguments go to each student.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1

runs=runs/demo
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus == 1 ? 1 : 2)) # 2 on a CPU too
train() { # name, then train.py's arguments; the launcher's own chatter stays in the log
  echo "== $1"
  mkdir -p "$runs"
  if ! deepspeed --num_gpus "$ranks" ibdistill/train.py "${@:2}" --run.dir "$runs/$1" > >(
    tee "$runs/$1.log" | grep --line-buffered -E '^[0-9:]{8} |^error'
  ) 2>&1; then
    echo "$1 failed; the whole log is $runs/$1.log" >&2
    exit 1
  fi
}
student() { # method, then further arguments
  train "$1" demo --student.model "$runs/pretrain/student" --objective.method "$1" --run.log_every 50 "${@:2}"
}

train pretrain demo_pretrain
train teacher demo_teacher --student.model "$runs/pretrain/student"
student finetune "$@"
student dss "$@"
student ib --teacher.placement zero3 --teacher.model "$runs/teacher/student" "$@"
echo
python tools/compare_runs.py "$runs"/{teacher,finetune,dss,ib}
echo
echo "curves: tensorboard --logdir $runs"
