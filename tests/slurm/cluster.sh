#!/usr/bin/env bash
# A Slurm cluster of one node on this machine's loopback interface, for tests: `cluster.sh install | up | down | remove`, as root on Debian.
# It runs without systemd, cgroups and accounting; its GPUs are character devices that act like /dev/null, so that Slurm counts
# them and sets CUDA_VISIBLE_DEVICES as on a real node. `down` ends the daemons that `up` started, by the ids they wrote; `remove` takes
# away the packages that `install` brought. Between `install` and `up`, and after `down`, every call of Snakemake on the machine takes ten seconds
# longer: its Slurm plugin asks the controller for its settings, and the command that it asks with (`scontrol show config`) waits that long for one.
# Settings: CLUSTER_CPUS (4), CLUSTER_GPUS (2), CLUSTER_DIR (/var/lib/dag-test-cluster).
set -euo pipefail

dir=${CLUSTER_DIR:-/var/lib/dag-test-cluster} cpus=${CLUSTER_CPUS:-4} gpus=${CLUSTER_GPUS:-2}
written="# written by tests/slurm/cluster.sh"
installed=/var/lib/dag-test-cluster.packages
# The default place: the plugin hides SLURM_CONF from the commands that it starts inside a job.
etc=/etc/slurm

fail() { echo "cluster.sh: $*" >&2; exit 1; }

wait_for() { # wait_for WHAT COMMAND...: up to 20 s
    local what=$1 try
    shift
    for ((try = 0; try < 200; try++)); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    tail -n 5 "$dir"/*.log >&2 || true
    fail "$what does not answer after 20 s; its log is in $dir"
}

running() { # running NAME: the daemon that `up` started is alive, and is no later process of the same id
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) && [ -n "$pid" ] && grep -qs "^$1" "/proc/$pid/comm"
}

ready() { sinfo --noheader --format=%T | grep -qE 'idle|mixed|allocated'; }

configure() {
    local host memory index
    if [ -e "$etc/slurm.conf" ] && ! grep -qF "$written" "$etc/slurm.conf"; then fail "$etc/slurm.conf is of another cluster, which stays as it is"; fi
    host=$(hostname -s)
    memory=$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
    mkdir -p "$etc" "$dir/state" "$dir/spool"
    for ((index = 0; index < gpus; index++)); do
        if [ ! -e "$dir/gpu$index" ]; then mknod -m 666 "$dir/gpu$index" c 1 3; fi
    done
    cat >"$etc/gres.conf" <<CONF
$written
NodeName=$host Name=gpu Type=fake File=$dir/gpu[0-$((gpus - 1))]
CONF
    # More memory than there is: jobs ask for what they need at most. MinJobAge: squeue has to show a finished job for three checks.
    cat >"$etc/slurm.conf" <<CONF
$written
ClusterName=dagtest
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2
ReturnToService=2
KillWait=5
MinJobAge=300
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$((memory * 8)) Gres=gpu:fake:$gpus
PartitionName=test Nodes=$host Default=YES MaxTime=1440 DefaultTime=10
CONF
}

up() {
    configure
    if ! munge --no-input >/dev/null 2>&1; then
        if [ ! -s /etc/munge/munge.key ]; then dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none; fi
        chown munge: /etc/munge/munge.key
        chmod 400 /etc/munge/munge.key
        install -d -o munge -g munge -m 755 /run/munge "$dir/munge"
        runuser -u munge -- munged --pid-file="$dir/munge/munged.pid" --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/seed"
        wait_for munged munge --no-input
        cp "$dir/munge/munged.pid" "$dir/munged.pid"
    fi
    if ! running slurmctld; then slurmctld; fi
    wait_for slurmctld scontrol ping
    if ! running slurmd; then slurmd; fi
    wait_for "the node" ready
}

install_packages() {
    dpkg-query --show --showformat '${Package}\n' | sort >"$installed.before"
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge
    dpkg-query --show --showformat '${Package}\n' | sort | comm -13 "$installed.before" - >>"$installed"
    rm "$installed.before"
}

remove_packages() {
    if [ ! -s "$installed" ]; then return; fi
    DEBIAN_FRONTEND=noninteractive xargs apt-get purge --yes <"$installed"
    rm "$installed"
}

down() {
    local name pid try
    if running slurmctld; then squeue --noheader --format=%A | xargs --no-run-if-empty scancel || true; fi
    for name in slurmd slurmctld munged; do
        if ! running "$name"; then continue; fi
        pid=$(cat "$dir/$name.pid")
        kill "$pid"
        for ((try = 0; try < 100; try++)); do
            if [ ! -d "/proc/$pid" ]; then break; fi
            sleep 0.1
        done
        if [ -d "/proc/$pid" ]; then kill -9 "$pid"; fi
    done
    for name in slurm.conf gres.conf; do
        if grep -qsF "$written" "$etc/$name"; then rm "$etc/$name"; fi
    done
    rm -rf "$dir"
}

[ "$(id -u)" = 0 ] || fail "needs root"
case ${1:-} in
    install | remove) "$1_packages" ;;
    up | down) "$1" ;;
    *) fail "expected install, up, down or remove, not '${1:-}'" ;;
esac
