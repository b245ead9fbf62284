#!/usr/bin/env bash
# Trains on a cluster that XPK made (https://github.com/AI-Hypercomputer/xpk, pip install xpk): TPU slices on GKE.
#
#   launch/xpk.sh start --project=P --zone=Z --cluster=C --name=run1 --image=…/nmm:1 --topology=v5p:4x4x8 -- \
#     python -m nmm_jax.train --config=configs/early_fusion.py:hw-1b --workdir=gs://bucket/run1
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/settings.sh
source launch/settings.sh
# shellcheck source=launch/topologies.sh
source launch/topologies.sh

usage() {
  cat <<'TEXT'
usage: launch/xpk.sh SUBCOMMAND --project=P --zone=Z --cluster=C [--name=N] [SETTINGS] [-- COMMAND...]

  start    runs COMMAND on every host; XPK asks before it replaces a workload of this name
  watch    waits until the workload ended
  list     lists the cluster's workloads
  logs     follows the log of the first host, through kubectl
  delete   ends the run; training saves a checkpoint on SIGTERM

  --project= --zone= --cluster=   of Google Cloud, and the cluster's name
  --name=                         of the workload
  --image=                        made from launch/Dockerfile                                                   (start)
  --topology=                     of a slice, as in `python -m nmm_jax.compile`: v5p:4x4x8, tpu7x:4x4x4, …       (start)
  --slices=1                      how many                                                                      (start)
  --max-restarts=10               after failures and preemptions together: XPK counts both                      (start)
  --dry-run                       prints what would run, and ends

Settings may also come from the environment: --max-restarts= is NMM_MAX_RESTARTS, and so on.
TEXT
}

workload() {
  run xpk workload "$@" --cluster="$cluster" --project="$project" --zone="$zone"
}

start() {
  # XPK puts the text of --command into a bash script of one line, in a Pod: exec hands it SIGTERM, and Kubernetes reads
  # $(NAME) as a variable and $$ as $.
  local text
  text="exec $(quoted "${command[@]}")"
  [[ $text != *$'\n'* ]] || die "XPK takes a command of one line, and a word after -- has two"
  local flags=(--docker-image="$image" --tpu-type="$tpu_type-$tpu_shape" --num-slices="$slices")
  flags+=(--max-restarts="$max_restarts" --termination-grace-period-seconds=300)
  ((tpu_hosts * slices == 1)) || flags+=(--env=NMM_COORDINATOR=auto)
  workload create --workload="$name" "${flags[@]}" --command="${text//$/\$\$}"
}

watch() {
  workload list --wait-for-job-completion="$name"
}

list() {
  workload list
}

logs() {
  local job=jobset.sigs.k8s.io
  run kubectl logs --follow --tail=100 \
    --selector="$job/jobset-name=$name,$job/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

delete() {
  workload delete --workload="$name"
}

case ${1-} in
  start | watch | list | logs | delete) subcommand=$1 ;;
  -h | --help) usage && exit 0 ;;
  *) die "give a subcommand: start, watch, list, logs or delete" ;;
esac
project='' zone='' cluster='' name='' image='' topology='' slices=1 max_restarts=10
read_settings project zone cluster name image topology slices max_restarts -- "${@:2}"
case $subcommand in
  start) require project zone cluster name image topology command ;;
  list) require project zone cluster ;;
  *) require project zone cluster name ;;
esac
if [[ $subcommand == start ]]; then
  require_count slices
  read_topology "$topology"
  require_gke_slices "$slices"
fi
"$subcommand"
