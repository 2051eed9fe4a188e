#!/usr/bin/env bash
# A real Slurm cluster on this machine, for tests and for trying out a provider.
#
#   scripts/local_slurm.sh up DIR [OPTION ...]    start munged, slurmctld and the slurmd of each node
#   scripts/local_slurm.sh down DIR               stop all daemons by their process IDs
#   scripts/local_slurm.sh start|stop DIR NAME    start or stop one daemon of DIR/daemons
#
#   --nodes N         number of nodes (2)
#   --cpus N          CPUs that each node reports (4)
#   --memory MB       memory that each node reports (2048)
#   --gpus N          GPUs of each node, simulated by empty files (1)
#   --min-job-age S   seconds after which slurmctld forgets an ended job (300)
#   --jobcomp         record ended jobs in DIR/completed, for `sacct --completion`
#   --accounting      record ended jobs in a separate database, for `sacct`
#   --constrain-cores nodes report this machine's CPUs, and jobs are confined to theirs
#   --no-cgroup       do not use cgroups even if they are available
#
# `up` prints the command that selects the cluster: export SLURM_CONF=DIR/slurm.conf. All files are in
# DIR (mode 0711), including munge's key and socket, and the database of --accounting (slurmdbd with
# MariaDB). DIR must have a short path, because paths of sockets are limited to 107 bytes. Daemons use
# free loopback ports and run as the current user. Nodes are named nPORT-1, nPORT-2, ... after the port of
# slurmctld: cgroups are named after nodes, and clusters on one machine must not share them.
set -euo pipefail

die() { echo "local_slurm: $*" >&2; exit 1; }

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }

need() {
    local packages=$1 tool
    shift
    PATH="$PATH:/usr/sbin:/sbin"
    for tool; do
        command -v "$tool" >/dev/null || die "$tool is missing; on Debian or Ubuntu: apt-get install $packages"
    done
}

# Print N free ports, below the kernel's range of ephemeral ports.
free_ports() {
    local low ports=() port tries=0
    read -r low _ </proc/sys/net/ipv4/ip_local_port_range
    ((low > 20000)) || low=32000
    while ((${#ports[@]} < $1)); do
        ((tries++ < 1000)) || die "found no free ports"
        port=$((20000 + (RANDOM * 32768 + RANDOM) % (low - 20000)))
        if [[ " ${ports[*]-} " == *" $port "* ]]; then continue; fi
        # The port is in use if a connection is accepted.
        if (exec 9<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue; fi
        ports+=("$port")
    done
    echo "${ports[@]}"
}

# Whether the memory controller of cgroup v1 can be used by this user.
has_cgroup_v1() {
    local probe=/sys/fs/cgroup/memory/deepsquare-probe-$$
    ((EUID == 0)) && [[ -d /sys/fs/cgroup/memory && -d /sys/fs/cgroup/freezer ]] &&
        mkdir "$probe" 2>/dev/null && rmdir "$probe"
}

# Whether this Slurm's version is above MAJOR MINOR.
newer_than() {
    local version major minor
    version=$(slurmctld -V)
    IFS=. read -r major minor _ <<<"${version##* }"
    ((10#$major > $1 || (10#$major == $1 && 10#$minor > $2)))
}

write_config() {
    local dir=$1 user host ports gres="" node
    user=$(id -un)
    host=$(hostname -s)
    read -ra ports <<<"$(free_ports $((nodes + 3)))"
    local prefix=n${ports[0]}-
    local tracking=proctrack/linuxproc task=task/none gather=jobacct_gather/linux over=OverMemoryKill
    if ((cgroup)) && has_cgroup_v1; then
        tracking=proctrack/cgroup task=task/cgroup over=""
        cat >"$dir/cgroup.conf" <<END
$(newer_than 21 8 && echo CgroupPlugin=cgroup/v1)
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
ConstrainCores=$( ((cores)) && echo yes || echo no )
END
        echo "memory limits: cgroup v1 ($tracking, $task)" >&2
    else
        # Without this, slurmd requires its own cgroup with any plugins; older versions don't know the value.
        if newer_than 23 10; then echo "CgroupPlugin=disabled" >"$dir/cgroup.conf"; fi
        echo "memory limits: by sampling, without cgroups ($tracking, $task, $over)" >&2
    fi
    if ((gpus)); then
        gres="Gres=gpu:$gpus"
        # Regular files simulate devices: Slurm counts and assigns them like real ones.
        for ((node = 0; node < gpus; node++)); do : >"$dir/gpu$node"; done
        local files="$dir/gpu0"
        if ((gpus > 1)); then files="$dir/gpu[0-$((gpus - 1))]"; fi
        echo "NodeName=${prefix}[1-$nodes] Name=gpu File=$files" >"$dir/gres.conf"
    fi
    {
        cat <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
SlurmdSpoolDir=$dir/spool-%n
TmpFS=$dir/tmp-%n
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ProctrackType=$tracking
TaskPlugin=$task
JobAcctGatherType=$gather
JobAcctGatherFrequency=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=50000,batch_sched_delay=0
EnforcePartLimits=NO
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=$slurmd_timeout
KillWait=3
MinJobAge=$min_job_age
MessageTimeout=10
PropagateResourceLimits=NONE
GetEnvTimeout=0
END
        if [[ -n $over ]]; then echo "JobAcctGatherParams=$over"; fi
        if ((jobcomp)); then
            echo "JobCompType=jobcomp/filetxt"
            echo "JobCompLoc=$dir/completed"
        fi
        if ((accounting)); then
            echo "AccountingStorageType=accounting_storage/slurmdbd"
            echo "AccountingStorageHost=127.0.0.1"
            echo "AccountingStoragePass=$dir/munge.socket"
            echo "AccountingStoragePort=${ports[nodes + 1]}"
        else
            echo "AccountingStorageType=accounting_storage/none"
        fi
        if ((gpus)); then echo "GresTypes=gpu"; fi
        for ((node = 1; node <= nodes; node++)); do
            echo "NodeName=$prefix$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[node]}" \
                "CPUs=$cpus RealMemory=$memory $gres"
        done
        echo "PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP"
        echo "PartitionName=short Nodes=${prefix}1 MaxTime=10 State=UP"
    } >"$dir/slurm.conf"
    if ((jobcomp)); then : >>"$dir/completed"; fi
    echo munged >"$dir/daemons"
    if ((accounting)); then write_database "$dir" "$user" "$host" "${ports[nodes + 1]}" "${ports[nodes + 2]}"; fi
    echo slurmctld >>"$dir/daemons"
    for ((node = 1; node <= nodes; node++)); do
        echo "$prefix$node"
        mkdir -p "$dir/spool-$prefix$node" "$dir/tmp-$prefix$node"
        # PMIx creates folders there with the same names on every node, so each node needs its own.
        chmod 1777 "$dir/tmp-$prefix$node"
    done >>"$dir/daemons"
}

# Create an empty database with a new password, and the configuration of slurmdbd.
write_database() {
    local dir=$1 user=$2 host=$3 port=$4 storage_port=$5 password
    need "slurmdbd mariadb-server" slurmdbd mariadbd mariadb-install-db sacctmgr
    password=$(head -c 18 /dev/urandom | base64 | tr -d '/+=')
    # In memory, where small writes are fast; `down` removes it.
    ln -s "$(mktemp -d /dev/shm/local-slurm-XXXXXXXX)" "$dir/database"
    mariadb-install-db --no-defaults --user="$user" --datadir="$dir/database/data" --skip-test-db \
        --innodb-log-file-size=8M >"$dir/start.log" 2>&1 || die "the database could not be made; see $dir/start.log"
    (
        umask 077
        cat >"$dir/mariadb.conf" <<END
[mariadbd]
user=$user
datadir=$dir/database/data
socket=$dir/database.socket
bind-address=127.0.0.1
port=$storage_port
pid-file=$dir/mariadbd.pid
init-file=$dir/database.sql
skip-name-resolve
innodb-buffer-pool-size=128M
innodb-log-file-size=8M
innodb-lock-wait-timeout=900
END
        # One statement per line. With the client library of MariaDB 11.8, slurmdbd can't create the database.
        printf '%s;\n' "CREATE DATABASE IF NOT EXISTS slurm" \
            "CREATE USER IF NOT EXISTS slurm IDENTIFIED BY '$password'" \
            "GRANT ALL ON slurm.* TO slurm" >"$dir/database.sql"
        cat >"$dir/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$port
SlurmUser=$user
PidFile=$dir/slurmdbd.pid
LogFile=$dir/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$storage_port
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm
END
    )
    printf '%s\n' mariadbd slurmdbd >>"$dir/daemons"
}

# Print the process ID of a daemon, if its PID file names a running daemon of this folder.
pid_of() {
    local pid
    pid=$(cat "$1/$2.pid" 2>/dev/null) && [[ $pid =~ ^[0-9]+$ ]] && [[ -d /proc/$pid ]] &&
        tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qxF "LOCAL_SLURM=$1" && echo "$pid"
}

start() {
    local dir=$1 name=$2
    if pid_of "$dir" "$name" >/dev/null; then return; fi
    rm -f "$dir/$name.pid"
    local environment=(env "LOCAL_SLURM=$dir" "SLURM_CONF=$dir/slurm.conf")
    case $name in
    munged)
        "${environment[@]}" munged --num-threads=2 --key-file="$dir/munge.key" \
            --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
            --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
        ;;
    mariadbd)
        setsid "${environment[@]}" mariadbd --defaults-file="$dir/mariadb.conf" >>"$dir/mariadbd.log" 2>&1 &
        ;;
    slurmdbd) "${environment[@]}" slurmdbd ;;
    slurmctld) "${environment[@]}" slurmctld -f "$dir/slurm.conf" ;;
    n*) "${environment[@]}" slurmd -N "$name" -f "$dir/slurm.conf" ;;
    *) die "there is no daemon $name" ;;
    esac </dev/null >>"$dir/start.log" 2>&1 || die "$name did not start; see $dir/start.log"
    for ((tries = 0; tries < 200; tries++)); do
        if pid_of "$dir" "$name" >/dev/null && answers "$dir" "$name"; then return; fi
        sleep 0.05
    done
    die "$name did not start; see its log in $dir"
}

# Whether a daemon is ready for the next one; slurmctld must be registered in accounting before it starts.
answers() {
    case $2 in
    mariadbd) [[ -S $1/database.socket ]] ;;
    slurmdbd) SLURM_CONF=$1/slurm.conf timeout 5 sacctmgr --immediate add cluster local >/dev/null 2>&1 ||
        SLURM_CONF=$1/slurm.conf timeout 5 sacctmgr --noheader show cluster local 2>/dev/null | grep -q local ;;
    esac
}

stop() {
    local dir=$1 name=$2 signal=${3-TERM} pid
    pid=$(pid_of "$dir" "$name") || return 0
    kill "-$signal" "$pid" 2>/dev/null || true
    for ((tries = 0; tries < 200; tries++)); do
        if [[ ! -d /proc/$pid ]]; then break; fi
        if ((tries == 160)); then kill -KILL "$pid" 2>/dev/null || true; fi
        sleep 0.05
    done
    rm -f "$dir/$name.pid"
}

up() {
    local dir=$1 name
    if [[ -e $dir/daemons ]]; then die "$dir holds a cluster already; end it first"; fi
    mkdir -p "$dir/state/env_cache"
    chmod 0711 "$dir"
    # With GetEnvTimeout=0 a job's environment is this file, not that of a login shell, whose start-up files
    # may take seconds per job.
    # In a cluster of root, other users have jobs too.
    local user
    while IFS=: read -r user _; do
        if ((EUID == 0)) || [[ $user == "$(id -un)" ]]; then
            printf '%s\n' "USER=$user" SHELL=/bin/sh PATH=/usr/local/bin:/usr/bin:/bin >"$dir/state/env_cache/$user"
        fi
    done < <(getent passwd)
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    write_config "$dir"
    while read -r name; do start "$dir" "$name"; done <"$dir/daemons"
    wait_idle "$dir"
    echo "export SLURM_CONF=$dir/slurm.conf"
}

wait_idle() {
    local states
    for ((tries = 0; tries < 300; tries++)); do
        states=$(SLURM_CONF=$1/slurm.conf sinfo --noheader --Node --partition=main --format=%T 2>/dev/null || true)
        if [[ $(grep -cx idle <<<"$states") == "$(grep -c '^n' "$1/daemons")" ]]; then return; fi
        sleep 0.1
    done
    SLURM_CONF=$1/slurm.conf sinfo --Node --long >&2 || true
    die "the nodes did not become idle; see the logs in $1"
}

# End jobs first, so that none of their processes remains.
down() {
    local dir=$1 name
    [[ -e $dir/daemons ]] || return 0
    if pid_of "$dir" slurmctld >/dev/null; then
        SLURM_CONF=$dir/slurm.conf timeout 20 scancel --quiet --user="$(id -un)" 2>/dev/null || true
        for ((tries = 0; tries < 100; tries++)); do
            if [[ -z $(SLURM_CONF=$dir/slurm.conf timeout 5 squeue --noheader 2>/dev/null) ]]; then break; fi
            sleep 0.1
        done
    fi
    # Nodes remove their cgroups only in an ordered shutdown.
    while read -r name; do
        if [[ $name == n* ]]; then stop "$dir" "$name" & else stop "$dir" "$name" KILL & fi
    done <"$dir/daemons"
    wait
    # A node that ran jobs may leave empty cgroups.
    while read -r name; do
        find /sys/fs/cgroup/*/"slurm_$name" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done < <(grep '^n' "$dir/daemons")
    rm -rf "$dir/state"
    if [[ -L $dir/database ]]; then rm -rf "$(readlink "$dir/database")" "$dir/database"; fi
    rm -f "$dir/daemons"
}

(($# >= 2)) || usage
command=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd -P)
shift 2
need "slurm-wlm munge" munged slurmctld slurmd sinfo scontrol
case $command in
up)
    nodes=2 cpus=4 memory=2048 gpus=1 min_job_age=300 slurmd_timeout=60 jobcomp=0 accounting=0 cgroup=1 cores=0
    while (($#)); do
        case $1 in
        --nodes | --cpus | --memory | --gpus | --min-job-age | --slurmd-timeout)
            [[ ${2-} =~ ^[0-9]+$ ]] || die "$1 wants a number"
            name=${1#--}
            declare "${name//-/_}=$2"
            shift 2
            ;;
        --jobcomp) jobcomp=1 && shift ;;
        --accounting) accounting=1 && shift ;;
        --constrain-cores) cores=1 cpus=$(nproc) && shift ;;
        --no-cgroup) cgroup=0 && shift ;;
        *) usage ;;
        esac
    done
    ((${#dir} <= 90)) || die "the path $dir is too long for a socket"
    up "$dir"
    ;;
down) down "$dir" ;;
start | stop)
    (($# == 1)) || usage
    grep -qx "$1" "$dir/daemons" 2>/dev/null || die "there is no daemon $1 in $dir"
    "$command" "$dir" "$1"
    ;;
*) usage ;;
esac
