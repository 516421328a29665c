#!/usr/bin/env bash
# The main job end to end on the embedded corpus, with 2 processes: pretrain a tiny T5 (the stand-in
# for a downloaded one), then distil it from 300 labelled problems with three methods.
# What is finished is not run again: `rm -r runs/demo` starts over. Arguments go to each distillation.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1

runs=runs/demo
train() { # name, then train.py's arguments; the launcher's own chatter stays in the log
  mkdir -p "$runs"
  if ! deepspeed --num_gpus 2 ibdistill/train.py "${@:2}" --run.dir "$runs/$1" > >(
    tee "$runs/$1.log" | grep --line-buffered -E '^[0-9:]{8} |^error'
  ) 2>&1; then
    echo "$1 failed; the whole log is $runs/$1.log" >&2
    exit 1
  fi
}

echo "== pretrain"
train pretrain demo_pretrain
for method in finetune dss ib; do
  echo "== $method"
  train "$method" demo --student.model "$runs/pretrain/student" --objective.method "$method" \
    --run.log_every 50 "$@"
done
echo
python tools/compare_runs.py "$runs"/finetune "$runs"/dss "$runs"/ib
echo
echo "curves: tensorboard --logdir $runs"
