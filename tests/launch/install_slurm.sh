#!/usr/bin/env bash
# Installs Debian's Slurm for tests/launch/test_slurm.py, where root and apt-get can; elsewhere the test is skipped.
set -euo pipefail

if PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; then
  exit 0
fi
if ((EUID)) || ! command -v apt-get >/dev/null; then
  echo "Slurm is not installed, and can be installed here only by root with apt-get: its test will be skipped."
  exit 0
fi
# RUNLEVEL=1: the packages' services stay off; the test starts daemons of its own.
export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1; then
  echo "apt-get could not install slurm-wlm and munge: the test of Slurm will be skipped."
fi
