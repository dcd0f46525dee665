#!/usr/bin/env bash
# The whole smoke study on a real Slurm of one node on this machine, from a fresh clone, as root on Debian. Slurm is installed for it, and removed
# after it, where it was not there before.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "run.sh: needs root: it installs, starts and stops Slurm" >&2; exit 1; }

make setup # takes minutes, in which Slurm would be there without a controller
trap 'bash tests/slurm/cluster.sh down; bash tests/slurm/cluster.sh remove >/dev/null' EXIT
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
    apt-get update --quiet
    bash tests/slurm/cluster.sh install
fi
bash tests/slurm/cluster.sh up
DAG_SLURM_WHOLE=1 make test ARGS="-m slurm -rs --durations=5"
