# shellcheck shell=bash
# What a slice, named as `python -m nmm_jax.compile --topology` names it (v5p:4x4x8), is called by gcloud and GKE.

# read_topology NAME: sets tpu_type, tpu_shape, tpu_chips, tpu_hosts, tpu_product, tpu_runtime, gke_accelerator and
# gke_machine, or refuses the name. A host has 4 chips, or the one of a slice of one.
#
# Product names count differently: v5p-256 and v4-256 have 256 cores on 128 chips, v5litepod-256 and v6e-256 have 256
# chips. https://cloud.google.com/tpu/docs/v5p, …/v5e, …/v6e, …/v4
# Runtimes: https://cloud.google.com/tpu/docs/runtimes. TPU7x comes through GKE alone, and has none:
#   https://cloud.google.com/tpu/docs/queued-resources
# GKE's names, and 4 chips a host: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and
#   system_characteristics.py of XPK 1.16
# shellcheck disable=SC2034  # the scripts that source this read them
read_topology() {
  local cores sides=3 side row # cores of a chip, type, runtime, GKE's accelerator, GKE's machine
  case ${1%%:*} in
    v4) row='2 v4 tpu-ubuntu2204-base tpu-v4-podslice ct4p-hightpu-4t' ;;
    v5e) sides=2 row='1 v5litepod v2-alpha-tpuv5-lite tpu-v5-lite-podslice ct5lp-hightpu-4t' ;;
    v5p) row='2 v5p v2-alpha-tpuv5 tpu-v5p-slice ct5p-hightpu-4t' ;;
    v6e) sides=2 row='1 v6e v2-alpha-tpuv6e tpu-v6e-slice ct6e-standard-4t' ;;
    tpu7x) row='2 tpu7x none tpu7x tpu7x-standard-4t' ;;
    *) die "--topology=$1: no such TPU; write v4, v5e, v5p, v6e or tpu7x, a colon and the shape, e.g. v5p:4x4x8" ;;
  esac
  read -r cores tpu_type tpu_runtime gke_accelerator gke_machine <<<"$row"
  tpu_shape=${1#*:}
  [[ $tpu_shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((sides - 1))}$ ]] ||
    die "--topology=$1: the shape of a slice of ${1%%:*} has $sides sides"
  tpu_chips=1
  for side in ${tpu_shape//x/ }; do
    tpu_chips=$((tpu_chips * side))
  done
  ((tpu_chips == 1 || tpu_chips % 4 == 0)) || die "--topology=$1: $tpu_chips chips are no whole number of hosts of 4"
  tpu_hosts=$(((tpu_chips + 3) / 4))
  ((tpu_chips > 1)) || gke_machine=${gke_machine%4t}1t
  tpu_product=$tpu_type-$((tpu_chips * cores))
}

# require_gke_slices COUNT: GKE connects only slices of several hosts; of the topology that was read.
# https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
require_gke_slices() {
  (($1 == 1 || tpu_hosts > 1)) || die "--slices=$1: GKE connects slices of several hosts each, and these have one"
}
