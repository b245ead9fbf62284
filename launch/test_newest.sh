#!/usr/bin/env bash
# The default tests on newer JAX, which needs Python 3.12: the first release without 3.11, and the newest.
#   launch/test_newest.sh VENV_PREFIX
set -euo pipefail
cd "$(dirname "$0")/.."
python=""
for candidate in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
  if "$candidate" --version >/dev/null 2>&1; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "Python 3.12 is not here: newer JAX cannot be tested on this machine."
  exit 0
fi
for jax in "jax==0.11.2" "jax"; do
  venv=$1-${jax//[^a-z0-9.]/-}
  if [ ! -e "$venv/ready" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet "$jax" --editable '.[dev]'
    touch "$venv/ready"
  fi
  "$venv/bin/python" -c 'import jax, flax, sys; print(f"== Python {sys.version.split()[0]}, JAX {jax.__version__}, Flax {flax.__version__}")'
  "$venv/bin/python" -m pytest
done
