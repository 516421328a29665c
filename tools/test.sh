#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, tests.
# Arguments go to pytest: bash tools/test.sh tests/data/test_batches.py -k padded
# Where there is a GPU, the tests that need one come last, in a process that sees it.
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
# One worker more than there are cores: some tests wait for Slurm, for a launcher or for a browser. Each takes
# 2 GB with its children, and from six on all wait for the one that has the Slurm cluster.
cores=$(env -u OMP_NUM_THREADS nproc)
workers=$((cores < 5 ? cores + 1 : 6))
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # else each of the many processes compiles the package again

ruff format --check ibdistill slurm tests tools
ruff check ibdistill slurm tests tools
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
python -m pytest -n $workers --dist loadfile --no-loadscope-reorder --durations=20
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # 5: no test is marked `gpu`
  python -m pytest -m gpu || [ $? -eq 5 ]
fi
