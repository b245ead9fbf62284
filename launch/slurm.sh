#!/usr/bin/env bash
# Submits a training command to Slurm, as many tasks on many nodes, again and again until it is done.
#
#   launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 -- python -m nmm_jax.train --config=… --workdir=…
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=launch/settings.sh
source "$here/settings.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm.sh --nodes=N --time=LIMIT [SETTINGS] [--dry-run] -- COMMAND...

Submits a job that runs COMMAND from this folder on every task (launch/slurm_job.sh). Before its time is over the tasks
get SIGTERM: training saves a checkpoint and exits with 143, and the job goes back into the queue, as it does when a node
is lost or a more urgent job takes the nodes. It is done when COMMAND ends with 0, and fails with any other code.

  --nodes=N            how many nodes
  --time=LIMIT         of one stay on the nodes, as sbatch takes it (minutes, H:M:S, D-H)
  --gpus-per-node=G    GPUs of each node (none unless given)
  --tasks-per-node=K   processes on each node, G a multiple of K (default: one a GPU; one where there are no GPUs)
  --cpus-per-task=C    cores of each process (default: nodes are taken whole, with all their cores and memory)
  --partition=P        where to queue (default: Slurm's)
  --account=A          who pays (default: Slurm's)
  --job-name=NAME      (default nmm)
  --notice=SECONDS     from SIGTERM to the limit, for the checkpoint (default 300)
  --requeue=yes|no     whether to go back into the queue (default yes)
  --dry-run            print what would be submitted, and end

Each can be set in the environment too: NMM_NODES, NMM_GPUS_PER_NODE, …. Whatever else sbatch takes is set in its own
variables: SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_MEM_PER_NODE, SBATCH_OUTPUT, … (sbatch(1), INPUT ENVIRONMENT VARIABLES).
TEXT
}

nodes='' time='' gpus_per_node='' tasks_per_node='' cpus_per_task='' partition='' account=''
job_name=nmm notice=300 requeue=yes
read_settings nodes time gpus_per_node tasks_per_node cpus_per_task partition account job_name notice requeue -- "$@"
require nodes time command
tasks_per_node=${tasks_per_node:-${gpus_per_node:-1}}
require_count nodes tasks_per_node notice ${gpus_per_node:+gpus_per_node} ${cpus_per_task:+cpus_per_task}
[[ -z $gpus_per_node ]] || ! ((gpus_per_node % tasks_per_node)) ||
  die "--gpus-per-node=$gpus_per_node is no multiple of --tasks-per-node=$tasks_per_node"
case $requeue in
  yes) requeue=--requeue ;;
  no) requeue=--no-requeue ;;
  *) die "--requeue=$requeue is neither yes nor no" ;;
esac

job=(--job-name="$job_name" ${partition:+--partition="$partition"} ${account:+--account="$account"})
job+=(--nodes="$nodes" --ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node")
job+=(${gpus_per_node:+--gpus-per-node="$gpus_per_node"})
if [[ -n $cpus_per_task ]]; then
  job+=(--cpus-per-task="$cpus_per_task")
else
  job+=(--exclusive --mem=0) # 0: all there is
fi
job+=(--time="$time" --signal="TERM@$notice" "$requeue" --open-mode=append)
run sbatch "${job[@]}" "$here/slurm_job.sh" "${command[@]}"
