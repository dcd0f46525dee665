#!/usr/bin/env bash
# The smoke study on a real Slurm of one node on this machine, from a fresh clone, as root on Debian: installs Slurm if need be.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "run.sh: needs root: it installs, starts and stops Slurm" >&2; exit 1; }
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
    apt-get update --quiet
    bash tests/slurm/cluster.sh install
fi
DAG_SLURM_WHOLE=1 make test ARGS="-m slurm -rs --durations=5"
