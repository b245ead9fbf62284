#!/usr/bin/env bash
# The job that launch/slurm.sh submits: its arguments, a training command, as all tasks of the job.
set -euo pipefail

export NMM_COORDINATOR=auto NMM_PROCESS_COUNT=$SLURM_NTASKS
# srun does not take sbatch's cores a task over; where nodes are taken whole, it would bind each task to one core.
cores=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
((${#cores[@]})) || cores=(--cpu-bind=none)

echo "launch/slurm_job.sh: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
# When a task has ended, the others have a minute before they are killed: they would wait for it for ever. (Not
# --kill-on-bad-exit: it kills by SIGTERM, and srun would end with 143 here when a task fails.)
code=0
srun --wait=60 --label "${cores[@]}" "$@" || code=$?
if ((code == 143)); then
  # The tasks were sent SIGTERM, and saved. A job that was submitted with --requeue=no is refused, and ends here.
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
