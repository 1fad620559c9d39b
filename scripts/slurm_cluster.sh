#!/usr/bin/env bash
# A private Slurm cluster on this one machine, for tests: munged, slurmctld and a slurmd for each node, all in one folder.
#
#   bash scripts/slurm_cluster.sh install             Debian's packages by apt-get (root)
#   bash scripts/slurm_cluster.sh start DIR [NODES]   NODES nodes (default 1) of CPUS cores (default 4; they may be fewer)
#   export SLURM_CONF=DIR/slurm.conf                  what sinfo, sbatch, squeue, ... need to find it
#   bash scripts/slurm_cluster.sh stop DIR            end its jobs and daemons; the folder and its logs stay
#
# DIR has configuration, key, sockets, state and logs, and ports are free ones, so that a cluster of another folder, or
# the machine's own, is not disturbed. Each of several nodes has a network, a host name and a folder for temporary files
# of its own, in namespaces (root, Linux), joined by a bridge that goes with the cluster. With OWNER=PID in the
# environment of start the cluster ends itself when that process is gone.
# Exit codes: 0 done, 1 failed, 3 this machine lacks what it takes (Slurm; namespaces, for several nodes).
set -euo pipefail
SELF=$(readlink -f "${BASH_SOURCE[0]}")
# Daemons lie where an ordinary user's path does not look.
export PATH=$PATH:/usr/sbin:/sbin
NEEDED="munged slurmctld slurmd sbatch srun scontrol squeue scancel"

fail() { # CODE TEXT
    echo "slurm_cluster: $2" >&2
    exit "$1"
}
missing() {
    local name
    for name in $NEEDED; do command -v "$name" >/dev/null || printf '%s ' "$name"; done
}

install_packages() {
    [ "$(id -u)" = 0 ] || fail 1 "installing Debian's packages needs root: ask for slurm-wlm, munge and libpmix2"
    command -v apt-get >/dev/null || fail 1 "no apt-get here: install Slurm and munge as this system does it"
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # the packages' own daemons stay down
    if [ -n "$(missing)" ] || ! ls /usr/lib/*/pmix2/lib/libpmix.so.2 >/dev/null 2>&1; then
        apt-get update -q >/dev/null && apt-get install -q -y --no-install-recommends slurm-wlm munge libpmix2 >/dev/null ||
            fail 1 "apt-get could not install slurm-wlm, munge and libpmix2"
    fi
    # Slurm's pmix plugin opens libpmix.so, a name that only the development package has (with autoconf and more).
    local folder
    for folder in /usr/lib/*/pmix2/lib; do
        [ ! -e "$folder/libpmix.so.2" ] || [ -e "$folder/libpmix.so" ] || ln -s libpmix.so.2 "$folder/libpmix.so"
    done
}

free_ports() { # HOW MANY: one after the other, none of them in use
    local port first=$((20000 + RANDOM % 20000)) tried
    for tried in $(seq 50); do
        for port in $(seq $first $((first + $1 - 1))); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
                first=$((20000 + RANDOM % 20000))
                continue 2
            fi
        done
        echo $first
        return
    done
    fail 1 "found no $1 free ports after $tried tries"
}

configure() { # DIR NODES
    local dir=$1 nodes=$2 host port node address=127.0.0.1
    host=$(hostname -s)
    port=$(free_ports $((nodes + 1)))
    dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
    chmod 400 "$dir/munge.key"
    if [ "$nodes" -gt 1 ]; then
        # A network of 198.18.0.0/15, which is kept for tests (RFC 2544): .1 is this machine, .2 the first node.
        echo "198.18.$((port % 256))" >"$dir/network"
        address=$(cat "$dir/network").1
    fi
    # What differs from a real cluster, and why:
    #   cred_expire        a requeued job waits as long as its old credentials live: 2 minutes otherwise
    #   linuxproc, none    no cgroups, which containers seldom allow
    #   config_overrides   nodes have the cores that are written here, not those of the machine
    #   KillWait           from SIGTERM to SIGKILL at the time limit: 30 otherwise
    #   sched_interval     a pending job starts within seconds
    cat >"$dir/slurm.conf" <<END
ClusterName=hpcdeq
SlurmctldHost=$host($address)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
TmpFS=$dir/tmp
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
KillWait=10
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES OverSubscribe=FORCE MaxTime=INFINITE State=UP
END
    # One node is called what this machine is called: mpirun looks for itself in the list of nodes.
    for node in $(seq "$nodes"); do
        if [ "$nodes" -gt 1 ]; then
            host=node$node
            address=$(cat "$dir/network").$((node + 1))
            echo "$address $host" >>"$dir/hosts"
        fi
        mkdir -p "$dir/spool-$host" "$dir/tmp-$host"
        echo "NodeName=$host NodeHostname=$host NodeAddr=$address Port=$((port + node)) CPUs=${CPUS:-4}" >>"$dir/slurm.conf"
    done
}

bridge() { echo "hq$(sed -n 's/^SlurmctldPort=//p' "$1/slurm.conf")"; } # DIR: its name, of 15 characters at most

join() { # DIR NODE: give the namespace of a node its end of a cable to the bridge
    local waited pid=
    for waited in $(seq 100); do
        [ ! -s "$1/node$2.namespace" ] || pid=$(cat "$1/node$2.namespace")
        [ -z "$pid" ] || break
        sleep 0.1
    done
    [ -n "$pid" ] && ip link add "$(bridge "$1")n$2" type veth peer name eth0 netns "$pid" &&
        ip link set "$(bridge "$1")n$2" master "$(bridge "$1")" up
}

node() { # DIR NODE: become the slurmd of a node, in namespaces that were just made
    local waited
    hostname "node$2"
    printf '127.0.0.1 localhost\n' | cat - "$1/hosts" >"$1/hosts-node$2"
    mount --bind "$1/hosts-node$2" /etc/hosts
    mount --bind "$1/tmp-node$2" "$1/tmp"
    ip link set lo up
    echo $$ >"$1/node$2.namespace"
    for waited in $(seq 100); do
        if ip link show eth0 >/dev/null 2>&1; then break; fi
        sleep 0.1
    done
    ip addr add "$(cat "$1/network").$(($2 + 1))/24" dev eth0
    ip link set eth0 up
    exec slurmd -D -N "node$2"
}

daemon() { # DIR NAME COMMAND...: in a session of its own, so that no terminal's signal reaches it
    local dir=$1 name=$2
    shift 2
    HPCDEQ_CLUSTER=$dir SLURM_CONF=$dir/slurm.conf setsid "$@" </dev/null >"$dir/$name.out" 2>&1 &
}

start() { # DIR NODES
    local dir=$1 nodes=$2 node waited
    [ -z "$(missing)" ] || fail 3 "not installed: $(missing)(as root: bash scripts/slurm_cluster.sh install)"
    [ ! -e "$dir/running" ] || fail 1 "a cluster has been started in $dir: stop it, or take another folder"
    [ ${#dir} -le 90 ] || fail 1 "$dir is too long: the path of a socket has 107 characters at most"
    [ "$nodes" = 1 ] || unshare --net --uts --mount ip link set lo up 2>/dev/null ||
        fail 3 "several nodes need network namespaces, which only root can make (unshare --net, ip)"
    mkdir -p "$dir/state" "$dir/tmp"
    chmod 700 "$dir"
    touch "$dir/running"
    configure "$dir" "$nodes"
    daemon "$dir" munged munged --foreground --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munged.pid" --seed-file="$dir/munged.seed" --log-file="$dir/munged.log"
    for waited in $(seq 100); do
        [ -S "$dir/munge.socket" ] && break
        sleep 0.1
    done
    if [ "$nodes" = 1 ]; then
        daemon "$dir" "slurmd-$(hostname -s)" slurmd -D
    else
        ip link add "$(bridge "$dir")" type bridge && ip addr add "$(cat "$dir/network").1/24" dev "$(bridge "$dir")" &&
            ip link set "$(bridge "$dir")" up || fail 3 "no bridge between nodes can be made here (ip link add type bridge)"
        for node in $(seq "$nodes"); do
            daemon "$dir" "slurmd-node$node" unshare --net --uts --mount bash "$SELF" node "$dir" "$node"
            join "$dir" "$node" || echo "node$node has no network" >&2
        done
    fi
    daemon "$dir" slurmctld slurmctld -D
    if [ -n "${OWNER:-}" ]; then setsid bash "$SELF" watch "$dir" "$OWNER" </dev/null >"$dir/watch.out" 2>&1 & fi
    export SLURM_CONF=$dir/slurm.conf
    for waited in $(seq 60); do
        if [ "$(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ]; then return; fi
        sleep 0.5
    done
    tail -n 15 "$dir"/*.out "$dir"/*.log >&2
    stop "$dir"
    fail 1 "the $nodes nodes of $dir did not come up within $((waited / 2)) seconds: see its logs above"
}

own_processes() { # DIR: daemons, and jobs with all that they started, known by their environment
    local jobs
    grep -lzxsF "HPCDEQ_CLUSTER=$1" /proc/[0-9]*/environ | cut -d/ -f3 || true
    jobs=$(grep -lzxsF "SLURM_CONF=$1/slurm.conf" /proc/[0-9]*/environ || true)
    # shellcheck disable=SC2086
    [ -z "$jobs" ] || grep -lzs '^SLURM_JOB_ID=' $jobs | cut -d/ -f3 || true
}

stop() { # DIR
    local dir=$1 signal deadline
    [ -e "$dir/running" ] || return 0
    for signal in TERM KILL; do
        deadline=$((SECONDS + 5))
        # What is a job's and has lost its daemon is found all the same.
        own_processes "$dir" | xargs -r kill -$signal 2>/dev/null || true
        while [ -n "$(own_processes "$dir")" ] && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
    done
    # The cables went with the namespaces that had their other ends.
    [ ! -e "$dir/network" ] || ip link del "$(bridge "$dir")" 2>/dev/null || true
    rm -f "$dir/running" "$dir/munge.socket" "$dir/munge.socket.lock"
}

watch() { # DIR PID
    while [ -e "$1/running" ] && kill -0 "$2" 2>/dev/null; do sleep 1; done
    stop "$1"
}

case "${1:-}:$#" in
install:1) install_packages ;;
start:2 | start:3) start "$(readlink -m "$2")" "${3:-1}" ;;
stop:2) stop "$(readlink -m "$2")" ;;
watch:3) watch "$2" "$3" ;;
node:3) node "$2" "$3" ;;
*)
    sed -n '2,13s/^# \{0,1\}//p' "$SELF"
    exit 1
    ;;
esac
