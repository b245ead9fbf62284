#!/usr/bin/env bash
# Starts a training command as several processes on this machine, each with its own simulated devices.
#
#   launch/local.sh --processes=2 --devices=4 -- python -m nmm_jax.train --config=configs/small.py --workdir=runs/small
set -euo pipefail

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

die() {
  echo "launch/local.sh: $1 (--help tells more)" >&2
  exit 2
}

processes=1 devices=1 port='' dry_run=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) die "unknown argument '$1'; the command comes after --" ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes is not a positive number"
[[ $devices =~ ^[1-9][0-9]*$ ]] || die "--devices=$devices is not a positive number"
(($#)) || die "no command after --"

if [[ -z $port ]]; then
  # A port that nobody listens on; the kernel's own choice needs a program to ask it.
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 30000))
    (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null || break
  done
fi

export JAX_PLATFORMS=cpu NMM_COORDINATOR=localhost:$port NMM_PROCESS_COUNT=$processes
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

if [[ -n $dry_run ]]; then
  for ((id = 0; id < processes; id++)); do
    printf '%s ' JAX_PLATFORMS=cpu "XLA_FLAGS='${XLA_FLAGS# }'" "NMM_COORDINATOR=$NMM_COORDINATOR" \
      "NMM_PROCESS_COUNT=$processes" "NMM_PROCESS_ID=$id"
    printf '%q ' "$@"
    echo
  done
  exit 0
fi

children=()
for ((id = 0; id < processes; id++)); do
  NMM_PROCESS_ID=$id "$@" > >(sed -u "s/^/[$id] /") 2> >(sed -u "s/^/[$id] /" >&2) &
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
