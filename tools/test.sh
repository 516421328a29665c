#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, tests.
# Arguments go to pytest: bash tools/test.sh tests/data -k padded
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
export OMP_NUM_THREADS=1

ruff format --check ibdistill slurm tests tools
ruff check ibdistill slurm tests tools
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
# Three workers for two cores: some tests wait for Slurm, for a launcher or for a browser.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
