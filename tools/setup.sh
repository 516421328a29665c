# Sourced by demo.sh and test.sh: enter the repository, make .venv with the package in it, activate it.
# Usage: source tools/setup.sh [EXTRA]   (EXTRA: dev)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "ibdistill needs Python 3.10 or newer; point PYTHON at one" >&2
  exit 1
fi
if [ ! -x .venv/bin/python ]; then
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "could not make .venv (Debian, Ubuntu: apt-get install python3-venv)" >&2
    exit 1
  fi
fi
# install once, and again when what is to be installed has changed
package=".${1:+[$1]}"
wanted=$(cat pyproject.toml tools/constraints.txt - <<< "$package" | sha256sum)
if [ "$(cat .venv/installed 2> /dev/null)" != "$wanted" ]; then
  .venv/bin/python -m pip install --quiet -c tools/constraints.txt -e "$package"
  echo "$wanted" > .venv/installed
fi
source .venv/bin/activate
