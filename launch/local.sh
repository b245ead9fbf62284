#!/usr/bin/env bash
# Starts a training command as several processes on this machine, each with its own simulated devices.
#
#   launch/local.sh --processes=2 --devices=4 -- python -m nmm_jax.train --config=configs/small.py --workdir=runs/small
set -euo pipefail
# shellcheck source=launch/settings.sh
source "$(dirname "$0")/settings.sh"

usage() {
  cat <<'TEXT'
usage: launch/local.sh --processes=K --devices=M [--port=P] [--dry-run] -- COMMAND...

Runs COMMAND as K processes with M simulated CPU devices each, which find each other on localhost. Their output is
prefixed with [process]. SIGINT and SIGTERM are passed on to all. If one fails, the others are stopped and the
script ends with its exit code.

  --processes=K   how many processes (default 1)
  --devices=M     simulated CPU devices of each (default 1)
  --port=P        of process 0 on localhost (default: a free one)
  --dry-run       print what would be started, and end
TEXT
}

processes=1 devices=1 port=''
read_settings processes devices port -- "$@"
require command
require_count processes devices

if [[ -z $port ]]; then
  # A port that nobody listens on, below those that the kernel lends to connections (from 32768).
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null || break
  done
fi

flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
variables=(JAX_PLATFORMS=cpu XLA_FLAGS="$flags" NMM_COORDINATOR=localhost:"$port" NMM_PROCESS_COUNT="$processes")

children=()
for ((id = 0; id < processes; id++)); do
  process=(env "${variables[@]}" NMM_PROCESS_ID="$id" "${command[@]}")
  if [[ -n $dry_run ]]; then
    quoted "${process[@]}"
    continue
  fi
  "${process[@]}" > >(sed -u "s/^/[$id] /") 2> >(sed -u "s/^/[$id] /" >&2) &
  children+=($!)
done

asked_to_stop=''
pass_on() {
  asked_to_stop=1
  kill -s "$1" "${children[@]}" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

code=0
while ((${#children[@]})); do
  sleep 0.2
  running=()
  for child in "${children[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      running+=("$child")
      continue
    fi
    status=0
    wait "$child" || status=$?
    if ((status && !code)); then
      code=$status
    fi
  done
  children=(${running[@]+"${running[@]}"})
  if ((code)) && [[ -z $asked_to_stop ]] && ((${#children[@]})); then
    echo "launch/local.sh: a process ended with exit code $code; stopping the others" >&2
    pass_on TERM
    sleep 3 # a process that waits for a dead neighbour does not hear SIGTERM
    kill -KILL "${children[@]}" 2>/dev/null || true
  fi
done
sleep 0.1 # the last lines are still on their way through sed
exit "$code"
