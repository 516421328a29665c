#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, tests.
# Arguments go to pytest: bash tools/test.sh tests/data/test_batches.py -k padded
# Where there is a GPU, the tests that need one come last, in a process that sees it.
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # else each of the many processes compiles the package again

ruff format --check ibdistill slurm tests tools
ruff check ibdistill slurm tests tools
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
# Three workers for two cores: some tests wait for Slurm, for a launcher or for a browser.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=20
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # 5: no test is marked `gpu`
  python -m pytest -m gpu || [ $? -eq 5 ]
fi
