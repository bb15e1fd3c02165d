#!/usr/bin/env bash
# A SLURM of two nodes, n1 and n2, on this machine, to try the job scripts; needs root and slurm-wlm, munge (apt-get).
#
#   bash scripts/slurm/local_cluster.sh start FOLDER    then: export SLURM_CONF=FOLDER/slurm.conf
#   bash scripts/slurm/local_cluster.sh stop FOLDER
#
# Everything it writes is in FOLDER. PORT (16817) is the first of five ports that it listens on.
set -euo pipefail

usage() { sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
[ $# -eq 2 ] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd)
PORT=${PORT:-16817}
export SLURM_CONF=$folder/slurm.conf

write_configuration() {
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=60
JobRequeue=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null || { echo "error: $program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
    done
    mkdir -p "$folder/state" "$folder/spool-n1" "$folder/spool-n2"
    chmod 755 "$folder"
    [ -f "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    write_configuration
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
        --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
    slurmctld -c
    for node in n1 n2; do slurmd -N "$node"; done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" -eq 2 ] && return
        sleep 0.5
    done
    echo "error: the nodes did not come up; see $folder/*.log" >&2
    tail -n 5 "$folder"/*.log >&2
    stop
    exit 1
}

stop() {
    for pid in "$folder"/slurmd-n*.pid "$folder/slurmctld.pid" "$folder/munge.pid"; do
        [ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true
    done
}

case $1 in
start) start ;;
stop) stop ;;
*) usage ;;
esac
