#!/bin/bash
# sandbox.sh FOLDER: a SLURM controller and two nodes, in namespaces of their own, until this process is killed.
# Runs behind `unshare --net --mount --uts --pid --fork --kill-child --mount-proc` (slurm_cluster.py): ports and /dev/shm
# are private, nothing outside is touched, and nothing outlives the sandbox.
set -euo pipefail
folder=$1
export SLURM_CONF=$folder/slurm.conf
mkdir -p "$folder"/{state,spool.node1,spool.node2}
sed "s#FOLDER#$folder#" "$(dirname "$0")/slurm.conf" > "$SLURM_CONF"
ip link set lo up
ip addr add 127.0.0.2/8 dev lo # with a single loopback address getaddrinfo("127.0.0.1") fails
mount -t tmpfs tmpfs /dev/shm
{ cat /etc/hosts; echo "127.0.0.1 node1"; echo "127.0.0.1 node2"; } > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
slurmctld -D -i > "$folder/slurmctld.out" 2>&1 &
for node in node1 node2; do
    unshare --uts sh -c 'hostname "$1"; exec slurmd -D -N "$1"' sh "$node" > "$folder/$node.out" 2>&1 &
done
wait
