#!/usr/bin/env bash
# A real SLURM of two nodes, n1 and n2, on this one machine, to try and to test hydra/launcher=slurm. Needs root; on
# Debian and Ubuntu it installs what is missing.
#
#   eval "$(bash scripts/slurm_local.sh start [FOLDER])"    start; sets SLURM_CONF in this shell
#   bash scripts/slurm_local.sh status|stop [FOLDER]
#
# Everything it writes is in FOLDER (${TMPDIR:-/tmp}/slurm-local), everything it starts has its pid file there.
set -euo pipefail
action=${1:-}
folder=$(realpath -m "${2:-${TMPDIR:-/tmp}/slurm-local}")
export SLURM_CONF=$folder/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin # where the daemons are; a user's own path may lack it
port=${SLURM_LOCAL_PORT:-17000} # of the controller; the nodes use the next two

fail() { # MESSAGE [EXIT CODE]: 2 where it can't work at all
    echo "error: $1" >&2
    exit "${2:-2}"
}

install() {
    if command -v slurmctld slurmd munged >/dev/null; then return; fi
    command -v apt-get >/dev/null || fail "slurmctld, slurmd and munged are missing, and there is no apt-get to install them"
    echo "Installing slurm-wlm and munge ..." >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$folder/apt.log" 2>&1 ||
        fail "apt-get install slurm-wlm munge failed: $(tail -n 1 "$folder/apt.log")"
}

configure() {
    local host
    host=$(hostname -s 2>/dev/null || hostname)
    mkdir -p "$folder"/{state,spool-n1,spool-n2}
    # A munge of our own, with its own key and socket, beside one that the system may have.
    [ -f "$folder/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    # A requeued job waits for cred_expire seconds and the next sched_interval. No cgroups: containers have none.
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
SchedulerParameters=sched_interval=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=4000
PartitionName=local Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
CONF
    if [ "$(slurmd -V | grep -oE '[0-9]+' | head -n 1)" -ge 24 ]; then # older ones know no such value and leave cgroups alone
        echo "CgroupPlugin=disabled" >"$folder/cgroup.conf"
    fi
}

running() { # NAME: the daemon whose pid file that is; a dead one may stay a zombie in a container
    local pid
    pid=$(cat "$folder/$1.pid" 2>/dev/null) && grep -qs "^${1%-n?}" "/proc/$pid/comm" &&
        ! grep -qs '^State:.*Z' "/proc/$pid/status"
}

both_idle() {
    [ "$(sinfo --noheader --Node --format=%t 2>/dev/null | grep -cE '^(idle|mix|alloc)$')" = 2 ]
}

start() {
    [ "$(id -u)" = 0 ] || fail "SLURM's daemons start jobs as other users: run this as root"
    mkdir -p "$folder"
    install
    configure
    running munged || munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>"$folder/munged.err"
    running slurmctld || slurmctld 2>>"$folder/slurmctld.err"
    for node in n1 n2; do
        running slurmd-$node || slurmd -N $node 2>>"$folder/slurmd-$node.err"
    done
    for _ in $(seq 120); do
        if both_idle; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    tail -n 3 "$folder"/*.log >&2
    fail "the two nodes did not come up within a minute; the logs are in $folder" 1
}

stop() {
    [ -d "$folder" ] || return 0
    if running slurmctld; then # what jobs left running would outlive the daemons
        scancel --full --signal=KILL --user=root 2>/dev/null || true
        for _ in $(seq 40); do
            [ -n "$(squeue --noheader --states=RUNNING,COMPLETING 2>/dev/null)" ] || break
            sleep 0.25
        done
    fi
    for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
        if running $daemon; then kill "$(cat "$folder/$daemon.pid")"; fi
    done
    for _ in $(seq 40); do
        running slurmd-n1 || running slurmd-n2 || running slurmctld || running munged || return 0
        sleep 0.25
    done
    fail "something is still running; the pid files are in $folder" 1
}

case $action in
start) start ;;
stop) stop ;;
status) sinfo --Node --format='%N %t' && squeue ;;
*) fail "which? start, stop or status, and perhaps a FOLDER" ;;
esac
