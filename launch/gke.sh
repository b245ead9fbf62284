#!/usr/bin/env bash
# Trains on a GKE cluster as a JobSet: TPU slices, or nodes with NVIDIA GPUs. kubectl's current context is the cluster.
#
#   launch/gke.sh start --name=run1 --image=…/nmm:1 --topology=v5p:4x4x8 --slices=2 -- \
#     python -m nmm_jax.train --config=configs/early_fusion.py:hw-1b --workdir=gs://bucket/run1
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/settings.sh
source launch/settings.sh
# shellcheck source=launch/topologies.sh
source launch/topologies.sh

usage() {
  cat <<'TEXT'
usage: launch/gke.sh SUBCOMMAND --name=N [SETTINGS] [-- COMMAND...]

  start    runs COMMAND on every host, in place of an ended JobSet of this name; refused while that runs
  watch    says how often the JobSet restarted, until it ended; ends with 0 if COMMAND did
  logs     follows the log of the first host
  delete   ends the run; training saves a checkpoint on SIGTERM

  --name=                     of the JobSet
  --image=                    made from launch/Dockerfile
  --topology= --slices=1      TPUs: of a slice, as in `python -m nmm_jax.compile`: v5p:4x4x8, tpu7x:4x4x4; and how many
  --gpu= --nodes=1 --gpus=8   GPUs: the node pool's label cloud.google.com/gke-accelerator, e.g. nvidia-h100-80gb;
                              how many nodes, and how many GPUs each has
  --namespace=default         of Kubernetes
  --max-restarts=3            after failures; restarts after preemptions are not counted
  --poll-seconds=30           between two looks (watch)
  --dry-run                   prints what would run, manifest and all, and ends

Settings may also come from the environment: --max-restarts= is NMM_MAX_RESTARTS, and so on.
TEXT
}

# json_words WORD...: a list for a manifest. Kubernetes reads $(NAME) as a variable, and $$ as $.
json_words() {
  local word list=''
  for word; do
    word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//$'\n'/\\n} word=${word//$'\t'/\\t} word=${word//$/\$\$}
    list+=", \"$word\""
  done
  echo "[${list#, }]"
}

# manifest: the template with its {{names}} filled in; the command last, since it may say anything.
manifest() {
  local template=launch/gke_tpu.yaml text key
  local -A values=([name]=$name [image]=$image [max_restarts]=$max_restarts)
  if [[ -n $topology ]]; then
    values+=([slices]=$slices [hosts]=$tpu_hosts [accelerator]=$gke_accelerator [shape]=$tpu_shape)
    values+=([chips]=$((tpu_chips / tpu_hosts)) [coordinator]=auto)
    ((tpu_hosts * slices > 1)) || values[coordinator]='' # alone: GKE names no neighbours to ask
  else
    template=launch/gke_gpu.yaml
    values+=([nodes]=$nodes [gpus]=$gpus [accelerator]=$gpu [coordinator]=$name-nodes-0-0.$name:8476)
  fi
  text=$(<"$template")
  for key in "${!values[@]}"; do
    text=${text//"{{$key}}"/"${values[$key]}"}
  done
  echo "${text/"{{command}}"/"$(json_words "${command[@]}")"}"
}

kube() {
  run kubectl --namespace="$namespace" "$@"
}

# Completed or Failed, or nothing while it runs; and how often it restarted.
jobset_state() {
  kube get jobset "$name" --ignore-not-found \
    --output=jsonpath='{.metadata.name}/{.status.terminalState}/{.status.restarts}'
}

start() {
  local there
  if [[ -n $dry_run ]]; then
    [[ -z $topology ]] ||
      echo "# needs $slices node pools: --machine-type=$gke_machine --tpu-topology=$tpu_shape --num-nodes=$tpu_hosts"
    echo "# an ended JobSet of this name is deleted; one that runs is left alone"
    jobset_state
    kube delete jobset "$name" --cascade=foreground
    echo "kubectl --namespace=$namespace apply --filename=- <<'MANIFEST'"
    manifest
    echo MANIFEST
    return
  fi
  there=$(jobset_state)
  case $there in
    '') ;;
    */Completed/* | */Failed/*) kube delete jobset "$name" --cascade=foreground ;;
    *) die "JobSet $name is there and has not ended; launch/gke.sh delete ends it" ;;
  esac
  manifest | kube apply --filename=-
}

watch() {
  local there='' now
  if [[ -n $dry_run ]]; then
    echo "# every $poll_seconds s until it ended:"
    jobset_state
    return
  fi
  while true; do
    now=$(jobset_state) || now=$there
    [[ $now == "$there" ]] || echo "$(date -u +%FT%TZ) name/state/restarts: ${now:-gone}"
    there=$now
    case $there in
      */Completed/*) return ;;
      */Failed/* | '') die "JobSet $name has failed or is gone; launch/gke.sh logs tells why" ;;
    esac
    sleep "$poll_seconds"
  done
}

logs() {
  local job=jobset.sigs.k8s.io
  kube logs --follow --tail=100 \
    --selector="$job/jobset-name=$name,$job/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

delete() {
  kube delete jobset "$name" --cascade=foreground
}

case ${1-} in
  start | watch | logs | delete) subcommand=$1 ;;
  -h | --help) usage && exit 0 ;;
  *) die "give a subcommand: start, watch, logs or delete" ;;
esac
name='' image='' topology='' slices=1 gpu='' nodes=1 gpus=8 namespace=default max_restarts=3
poll_seconds=30
read_settings name image topology slices gpu nodes gpus namespace max_restarts poll_seconds -- "${@:2}"
if [[ $subcommand == start ]]; then
  if [[ -n $gpu ]]; then require name image command; else require name image topology command; fi
  [[ -z $gpu || -z $topology ]] || die "--topology is of TPUs and --gpu of GPUs; give one of them"
  require_count slices nodes gpus
  if [[ -n $topology ]]; then
    read_topology "$topology"
    require_gke_slices "$slices"
  fi
fi
require name
# The longest name made of it is of a Pod: NAME-slice-99-9999-abcde.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name=$name: write up to 40 small letters, digits and dashes"
"$subcommand"
