#!/usr/bin/env bash
# The part of launch/tpu_vm.sh that runs on every host of a slice. Its files are in ~/nmm: the code, the environment,
# and for each run a log, and the exit code once it ended. A host runs one at a time: the lock is held while it does.
#
#   tpu_worker.sh install               an environment with JAX for TPUs, of the versions in requirements.txt
#   tpu_worker.sh start RUN COMMAND...  in the background; refused while a run is going on
#   tpu_worker.sh status RUN            prints: nmm HOST running, nmm HOST exit CODE, or nmm HOST absent
#   tpu_worker.sh stop                  SIGTERM, on which training saves a checkpoint; SIGKILL after five minutes
set -euo pipefail
cd ~/nmm

install() {
  # Runtime images bring Python 3.10; uv brings its own 3.11. Newer images refuse pip without the variable (PEP 668).
  local uv=~/.local/bin/uv
  [[ -x $uv ]] || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  "$uv" venv --quiet --allow-existing --python 3.11 environment
  "$uv" pip install --quiet --python environment/bin/python --requirement code/requirements.txt 'jax[tpu]'
  "$uv" pip install --quiet --python environment/bin/python --no-deps --editable code
}

start() {
  local run=$1
  exec 9>>lock # what is started inherits the lock, and holds it until its last process ends
  flock --timeout 2 9 || {
    echo "$(hostname): a run is going on, $(<running)" >&2
    exit 1
  }
  echo "$run" >running
  rm -f "$run.exit"
  setsid code/launch/tpu_worker.sh supervise "$@" >>"$run.log" 2>&1 </dev/null &
}

supervise() {
  local run=$1 code=0
  echo $$ >group # setsid made this process the leader of its group
  trap : TERM    # outlives the command, to write its exit code
  export NMM_COORDINATOR=auto PATH=~/nmm/environment/bin:$PATH
  cd code
  "${@:2}" || code=$?
  echo "$code" >"$HOME/nmm/$run.exit"
}

is_running() {
  ! flock --nonblock lock true
}

status() {
  local state=absent
  if is_running; then
    state=running
  elif [[ -e $1.exit ]]; then
    state="exit $(<"$1.exit")"
  fi
  echo "nmm $(hostname) $state"
}

stop() {
  is_running || return 0
  kill -TERM -- "-$(<group)" || true # it may end at this moment
  flock --timeout 300 lock true || kill -KILL -- "-$(<group)"
}

"$@"
