#!/usr/bin/env bash
# Set up .venv and run every check: format, lint, tests, and the kernels in Triton's interpreter.
# Arguments go to pytest: bash tools/test.sh tests/test_data.py -k padded
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
export OMP_NUM_THREADS=1

ruff format --check ibdistill slurm tests tools
ruff check ibdistill slurm tests tools
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
TRITON_INTERPRET=1 python -m pytest -n 2 tests/ops/test_head_loss_triton.py tests/ops/test_vid_triton.py
# Three workers for two cores: some tests wait for Slurm, for a launcher or for a browser.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
