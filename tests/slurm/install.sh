#!/bin/bash
# Debian's SLURM for tests/slurm, once, where this user may install it; without it those tests are skipped, and say so.
set -u
# One by one: of several names `command -v` is content with any.
is_there=yes
for name in slurmctld slurmd sbatch srun scontrol ip; do command -v "$name" > /dev/null || is_there=no; done
if [ $is_there = yes ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "SLURM is not installed (that needs root and apt-get): tests/slurm will be skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# policy-rc.d keeps the packages from starting daemons of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy && trap 'rm -f $policy' EXIT; fi
if ! { timeout 120 apt-get update -qq &&
    timeout 240 apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client iproute2; } > "$log" 2>&1; then
    echo "SLURM could not be installed (no network?): tests/slurm will be skipped; $(tail -n 1 "$log")"
fi
rm -f "$log"
