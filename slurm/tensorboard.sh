#!/bin/bash
# TensorBoard over all runs below a folder, on a login node: bash slurm/tensorboard.sh [RUNS] [PORT]
# It is bound to loopback, since it asks for no password: reach it through the ssh line that this prints.
set -eo pipefail
runs=${1:-runs}
# a port of one's own, so that two users of a login node do not meet
port=${2:-$((10000 + UID % 20000))}
fail() {
  echo "error: $*" >&2
  exit 2
}
[ -f slurm/env.sh ] || fail "$PWD is not the repository's root; start from there"
[ -d "$runs" ] || fail "no folder $runs; usage: bash slurm/tensorboard.sh [RUNS] [PORT]"
source slurm/env.sh
echo "on your own machine:  ssh -N -L $port:localhost:$port $(id -un)@$(hostname)"
echo "and in its browser:   http://localhost:$port"
exec tensorboard --logdir "$runs" --host 127.0.0.1 --port "$port"
