#!/usr/bin/env bash
# Trains on Cloud TPU VMs, asked for as a queued resource: one slice or several, any number of hosts.
#
#   launch/tpu_vm.sh watch --project=P --zone=Z --name=run1 --topology=v5p:4x4x8 -- \
#     python -m nmm_jax.train --config=configs/early_fusion.py:hw-1b --workdir=gs://bucket/run1
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/settings.sh
source launch/settings.sh
# shellcheck source=launch/topologies.sh
source launch/topologies.sh

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh SUBCOMMAND --project=P --zone=Z --name=N [SETTINGS] [-- COMMAND...]

  create    asks for the slices, and waits until they are there
  install   puts the code and an environment on every host; again and again does no harm
  start     runs COMMAND on every host, in the background; refused while a run is going on
  watch     does all of that as it is needed, until COMMAND ends with 0 on every host: creates what is missing or was
            preempted, installs, starts. Keep it running; ending it leaves the slices and the run as they are
  status    says of every host: running, exit CODE, or absent
  logs      follows the log of one host
  stop      ends the run: training saves a checkpoint on SIGTERM
  delete    gives the slices back, whatever runs there

  --project=, --zone=    of Google Cloud
  --name=                of the queued resource, its nodes and the run; the log is ~/nmm/NAME.log on every host
  --topology=            of a slice, as in `python -m nmm_jax.compile`: v4:…, v5e:…, v5p:… or v6e:…  (create, watch)
  --slices=1             how many                                                                    (create, watch)
  --capacity=on-demand   or spot, or reserved                                                        (create, watch)
  --service-account=     of the hosts; else the project's default                                    (create, watch)
  --runtime-version=     of the hosts' image; else that of the TPU's generation                      (create, watch)
  --create-flags=        more flags for `queued-resources create`, separated by spaces, e.g. --network=…
  --repository=          cloned by every host; without it this checkout is copied there              (install, watch)
  --revision=HEAD        the commit to clone or copy; uncommitted changes stay here                  (install, watch)
  --max-restarts=3       after failures; restarts after preemptions are not counted                  (watch)
  --poll-seconds=30      between two looks                                                           (create, watch)
  --worker=0             whose log, of the first slice                                               (logs)
  --ssh-flags=           more flags for ssh and scp, separated by spaces, e.g. --tunnel-through-iap
  --dry-run              prints what would run, and ends

Settings may also come from the environment: --service-account= is NMM_SERVICE_ACCOUNT, and so on.
TEXT
}

LOOKS=10 # after which watch says again what it waits for

say() {
  echo "$(date -u +%FT%TZ) $*"
}

queued() {
  run gcloud compute tpus queued-resources "$@" --project="$project" --zone="$zone"
}

# on_workers TEXT: a shell command in the home directory of every host of every slice.
on_workers() {
  queued ssh "$name" --node=all --worker=all "${ssh_words[@]}" --command="$1"
}

# Of the queued resource: CREATING, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, …; nothing if there is none.
queue_state() {
  run gcloud compute tpus queued-resources list --project="$project" --zone="$zone" \
    --filter="name~/queuedResources/$name\$" --format='value(state.state)'
}

# Of every node, which is one slice: its state and its number of hosts. Not by name: run1-0 and run1-1, the nodes of two
# slices of run1, may be those of other runs.
nodes() {
  run gcloud compute tpus tpu-vm list --project="$project" --zone="$zone" \
    --filter="queuedResource~/queuedResources/$name\$" --format='value(state,networkEndpoints.len())'
}

ask() {
  local release=() spot=--spot flags=(--accelerator-type="$tpu_product")
  if [[ $tpu_shape == *x*x* ]]; then
    # As many cores have many shapes in three dimensions. Only gcloud alpha takes a v5p by its shape; there --spot alone
    # leaves the provisioning model at standard (SetProvisioningModel of gcloud 528).
    release=(alpha) spot=--provisioning-model=spot flags=(--type="$tpu_type" --topology="$tpu_shape")
  fi
  flags+=(--runtime-version="${runtime_version:-$tpu_runtime}")
  if ((slices > 1)); then
    flags+=(--node-count="$slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  case $capacity in
    spot) flags+=("$spot") ;;
    reserved) flags+=(--reserved) ;;
  esac
  [[ -z $service_account ]] || flags+=(--service-account="$service_account")
  run gcloud "${release[@]}" compute tpus queued-resources create "$name" "${flags[@]}" "${create_words[@]}" \
    --project="$project" --zone="$zone"
}

failed_request() {
  die "the request failed; gcloud compute tpus queued-resources describe $name tells why; delete it, then ask again"
}

create() {
  local state='' now absent=0
  echo "# $slices x $topology: $tpu_product in lists of prices and quotas, $tpu_chips chips each"
  ask
  if [[ -n $dry_run ]]; then
    echo "# every $poll_seconds s until it is ACTIVE:"
    queue_state
    return
  fi
  while [[ $state != ACTIVE ]]; do
    if now=$(queue_state); then
      [[ $now == "$state" ]] || say "$name: ${now:-gone}"
      state=$now
      case $state in
        '')
          absent=$((absent + 1)) # once may be a list that is older than the request
          ((absent < 3)) || die "there is no request $name (any more); if it was not deleted on purpose, create it again"
          ;;
        FAILED) failed_request ;;
        SUSPENDED) die "the slices were taken back; delete $name and create it again, which watch does by itself" ;;
      esac
    fi
    sleep "$poll_seconds"
  done
}

install() {
  local archive=build/$name.tar.gz unpack='rm -rf nmm/code && mkdir nmm/code && tar -xzf nmm.tar.gz -C nmm/code'
  if [[ -n $repository ]]; then
    unpack="test -e nmm/code/.git || { rm -rf nmm/code && git clone --quiet $(quoted "$repository") nmm/code; }
cd nmm/code && git fetch --quiet origin
git checkout --quiet --detach $(quoted "origin/$revision") || git checkout --quiet --detach $(quoted "$revision")"
  else
    run mkdir -p build
    run git archive --format=tar.gz --output="$archive" "$revision" || return
    queued scp "$archive" "$name:nmm.tar.gz" --node=all --worker=all "${ssh_words[@]}" || return
  fi
  on_workers "set -e
mkdir -p nmm
flock --nonblock nmm/lock true || { echo 'a run is going on' >&2; exit 1; }
$unpack
~/nmm/code/launch/tpu_worker.sh install"
}

start() {
  on_workers "nmm/code/launch/tpu_worker.sh start $(quoted "$name" "${command[@]}")"
}

status() {
  on_workers "test -e nmm/code || exec echo nmm \$(hostname) absent
nmm/code/launch/tpu_worker.sh status $(quoted "$name")"
}

stop() {
  on_workers "test ! -e nmm/code || nmm/code/launch/tpu_worker.sh stop"
}

logs() {
  queued ssh "$name" --node=0 --worker="$worker" "${ssh_words[@]}" \
    --command="tail --lines=100 --follow=name nmm/$name.log"
}

delete() {
  queued delete "$name" --force --quiet
}

# look: one look at slices that are ACTIVE. Sets found to what is to be done about them.
look() {
  local there hosts answers before=$report
  report=''
  there=$(nodes) && report=$(status 2>"$complaints" | grep '^nmm ' | sort) || true
  hosts=$(awk '{ hosts += $2 } END { print hosts + 0 }' <<<"$there")
  answers=$(awk 'NF { answers++ } END { print answers + 0 }' <<<"$report")
  if grep -qE '^(PREEMPTED|TERMINATED)' <<<"$there"; then
    found=recreate
  elif ((answers == 0 || answers < hosts)); then
    found="wait for all hosts to answer; $answers of $hosts do"
  elif ! grep -qv ' running$' <<<"$report"; then
    found=running
  elif [[ -n $started ]] && ! grep -qv ' exit 0$' <<<"$report"; then
    found=finished
  elif [[ $report != "$before" ]]; then
    found='wait for all hosts to do the same'
  elif [[ -n $started ]] && grep -qvE ' (running|absent|exit (0|143))$' <<<"$report"; then
    found=failed
  else
    found=restart
  fi
}

watch() {
  local state said='' failures=0 waits=0 found report='' started=''
  if [[ -n $dry_run ]]; then
    plan
    return
  fi
  complaints=$(mktemp) # not local: the trap runs after the function
  trap 'rm -f "$complaints"' EXIT
  while true; do
    state=$(queue_state) || state=UNREACHABLE
    found=$state
    case $state in
      '') found=create ;;
      SUSPENDED) found=recreate ;;
      FAILED) failed_request ;;
      ACTIVE) look ;;
    esac
    if [[ $found == wait* ]]; then
      waits=$((waits + 1))
    else
      waits=0
    fi
    if [[ $found != "$said" ]] || ((waits && waits % LOOKS == 0)); then
      say "$name: $found"
      [[ $found != wait* ]] || tail -n 3 "$complaints" >&2
      said=$found
    fi
    if ((waits && waits % LOOKS == 0)); then
      say "$name: this may not end by itself. To have all slices replaced, launch/tpu_vm.sh delete in another window;" \
        "watch goes on here, and asks for them anew"
    fi
    if [[ $found == failed ]]; then
      failures=$((failures + 1))
      ((failures <= max_restarts)) || die "the command failed $failures times; launch/tpu_vm.sh logs tells why"
      found=restart
    fi
    case $found in
      finished) return ;;
      running) started=1 ;;
      create) ask || say "$name: could not be asked for; trying again" ;;
      recreate) { delete && ask; } || say "$name: could not be asked for; trying again" ;;
      restart) { stop && install && start && started=1; } || say "$name: could not be started; trying again" ;;
    esac
    sleep "$poll_seconds"
  done
}

# plan: what watch does, for its dry run.
plan() {
  echo "# every $poll_seconds s, the state of the queued resource:"
  queue_state
  echo "# none: it is asked for"
  ask
  echo "# SUSPENDED, or a node PREEMPTED or TERMINATED: it is deleted, and asked for again as above"
  delete
  echo "# ACTIVE: its nodes, their hosts, and what these do:"
  nodes
  status
  echo "# not running on all hosts, nor ended with 0 on all: installed and started anew"
  stop
  install
  start
}

case ${1-} in
  create | install | start | watch | status | logs | stop | delete) subcommand=$1 ;;
  -h | --help) usage && exit 0 ;;
  *) die "give a subcommand: create, install, start, watch, status, logs, stop or delete" ;;
esac
project='' zone='' name='' topology='' slices=1 capacity=on-demand service_account='' runtime_version='' create_flags=''
repository='' revision=HEAD max_restarts=3 poll_seconds=30 worker=0 ssh_flags=''
read_settings project zone name topology slices capacity service_account runtime_version create_flags repository \
  revision max_restarts poll_seconds worker ssh_flags -- "${@:2}"
case $subcommand in
  create) require project zone name topology ;;
  start) require project zone name command ;;
  watch) require project zone name topology command ;;
  *) require project zone name ;;
esac
require_count slices
[[ $capacity =~ ^(on-demand|spot|reserved)$ ]] || die "--capacity=$capacity is none of on-demand, spot, reserved"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name=$name: write small letters, digits and dashes"
if [[ -n $topology ]]; then
  read_topology "$topology"
  [[ $tpu_runtime != none ]] || die "--topology=$topology: TPU7x comes through GKE alone (launch/gke.sh, launch/xpk.sh)"
fi
if [[ -z $repository && $revision == HEAD && -z $dry_run ]]; then
  revision=$(git rev-parse HEAD) # what a restart installs is what the first start installed
fi
read -ra create_words <<<"$create_flags"
read -ra ssh_words <<<"$ssh_flags"
"$subcommand"
