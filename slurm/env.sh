# shellcheck shell=bash
# Sourced by the scripts beside it, in jobs and on a login node, from the repository's root.
# The one block to adapt to a cluster: how to reach a Python that has ibdistill.
# ------------------------------------------------------------------------------------------
# module load python/3.12 cuda/12.8

IBDISTILL_VENV=${IBDISTILL_VENV:-.venv}
if [ ! -f "$IBDISTILL_VENV/bin/activate" ]; then
  echo "error: no virtual environment in $IBDISTILL_VENV (seen from $PWD on $(hostname)): make it with" \
    "'bash tools/setup.sh', point IBDISTILL_VENV at another, or adapt slurm/env.sh" >&2
  exit 2
fi
# shellcheck source=/dev/null
source "$IBDISTILL_VENV/bin/activate"

# Only where ranks pick a network on which the nodes cannot reach each other:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# ------------------------------------------------------------------------------------------
