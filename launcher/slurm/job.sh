# shellcheck shell=bash
# What the job scripts share. Sourced in the repository's root, behind `set -uo pipefail`; bash 4.4 or later.
#
#   run_ranks COMMAND...        the command as ranks on all nodes of the job, through srun
#   run_alone COMMAND...        the command as one process on the first node
#   finish                      act on how it ended: done, requeued, or failed; does not return
#
# Exit codes are those of homodistil/distributed/exit_codes.py.

readonly USER_ERROR=2 STOPPED=75 RANK_LOST=76 CHECK_FAILED=77 ENDED_BY_USR1=138

SRUN_OPTIONS=() COMMAND_PREFIX=()
SITE_FILE=${HOMODISTIL_SITE:-launcher/slurm/site.env}
if [ -f "$SITE_FILE" ]; then
    # shellcheck source=site.env.example
    . "$SITE_FILE"
elif [ -n "${HOMODISTIL_SITE:-}" ]; then
    echo "error: HOMODISTIL_SITE: found no file $HOMODISTIL_SITE; copy launcher/slurm/site.env.example there" >&2
    exit $USER_ERROR
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ ${#COMMAND_PREFIX[@]} -eq 0 ] && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

RESTART=${SLURM_RESTART_COUNT:-0}
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
JOB_LOGS=${LOG_DIR:-slurm-logs}/$SLURM_JOB_NAME-$JOB
LOGS=$JOB_LOGS/start-$RESTART
mkdir -p "$LOGS" || exit $USER_ERROR
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# -- signals: USR1 comes before the time limit; TERM when SLURM itself cancels, preempts or requeues the job.
asked_to_stop='' ended_by_slurm='' step_pid='' step_code=0
trap 'asked_to_stop=1; [ -z "$step_pid" ] || kill -USR1 "$step_pid" 2>/dev/null' USR1
trap 'ended_by_slurm=1' TERM

say() { echo "$(date -u +%FT%TZ) $*" | tee -a "$JOB_LOGS/summary.txt"; }

run_ranks() {
    local ranks=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
    local cpus=$((${SLURM_CPUS_ON_NODE:-$ranks} / ranks))
    ((cpus > 0)) || cpus=1
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    say "job $JOB start $RESTART: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $ranks ranks," \
        "master $MASTER_ADDR:$MASTER_PORT, a log a rank in $LOGS"
    # No --kill-on-bad-exit: ranks notice a lost one by themselves, name it and end; --wait bounds that.
    run_step srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" \
        --ntasks-per-node="$ranks" --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait="${RANK_EXIT_WAIT_S:-120}" \
        --output="$LOGS/rank-%4t.txt" "${SRUN_OPTIONS[@]}" "${COMMAND_PREFIX[@]}" "$@"
}

run_alone() {
    local cpus=${SLURM_CPUS_ON_NODE:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    say "job $JOB start $RESTART: $SLURM_JOB_NODELIST, log in $LOGS"
    run_step srun --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --output="$LOGS/rank-%4t.txt" --open-mode=append \
        "${SRUN_OPTIONS[@]}" "${COMMAND_PREFIX[@]}" "$@"
}

# Runs srun so that the traps work meanwhile; its exit code is in step_code.
run_step() {
    step_code=$STOPPED
    [ -z "$asked_to_stop" ] || return $STOPPED # asked before anything was started
    "$@" 2> "$LOGS/srun.txt" &
    step_pid=$!
    [ -z "$asked_to_stop" ] || kill -USR1 "$step_pid" # asked between the two lines above
    while :; do
        wait "$step_pid"
        step_code=$?
        kill -0 "$step_pid" 2>/dev/null || break # else a trap has interrupted the waiting
    done
    local ended # if it ended while a trap ran, its code is still to be had; 127: it was the code above
    wait "$step_pid" 2>/dev/null
    ended=$?
    ((ended == 127)) || step_code=$ended
    step_pid=''
    cat "$LOGS/srun.txt" >&2
    step_code=$(deciding_code "$step_code")
    return "$step_code"
}

# srun reports the highest code of all ranks. A rank that failed by itself makes the others say 76: its own code decides.
deciding_code() {
    local code
    for code in $USER_ERROR $CHECK_FAILED 1; do
        if grep -qE "xited with exit code $code\$" "$LOGS/srun.txt"; then
            echo "$code"
            return
        fi
    done
    echo "$1"
}

finish() {
    local code=$step_code
    if [ -n "$asked_to_stop" ] && ((code > 128 || code == RANK_LOST)); then code=$STOPPED; fi # some ranks were not ready yet
    if ((code == 0)); then
        say "job $JOB: done"
    elif [ -n "$ended_by_slurm" ]; then
        say "job $JOB: ended by SLURM (code $code); what was preempted or requeued starts again by itself"
    elif ((RESTART >= ${MAX_RESTARTS:-100})); then
        say "job $JOB: code $code after $RESTART restarts (MAX_RESTARTS), not requeued"
    elif ((code == STOPPED || code == ENDED_BY_USR1)); then
        requeue "stopped on request"
    elif ((code == RANK_LOST || code > 128)); then
        requeue_after_loss "$code"
    else
        say "job $JOB: failed (code $code), not requeued: $(first_error)"
    fi
    exit "$code"
}

requeue_after_loss() {
    local losses
    losses=$(count_loss)
    if ((losses > ${MAX_LOSS_REQUEUES:-3})); then
        say "job $JOB: rank lost (code $1), $losses losses without a new checkpoint (MAX_LOSS_REQUEUES), not requeued: $(first_error)"
    else
        requeue "rank lost (code $1, ${losses} of ${MAX_LOSS_REQUEUES:-3}): $(first_error)"
    fi
}

# How many losses there were since the run's last checkpoint, this one included.
count_loss() {
    local before=0 at='' now
    now=$(cat "${CHECKPOINTS:-.}/latest" 2>/dev/null)
    [ ! -f "$JOB_LOGS/losses" ] || read -r before at < "$JOB_LOGS/losses"
    [ "$at" = "$now" ] || before=0
    echo "$((before + 1)) $now" > "$JOB_LOGS/losses"
    echo "$((before + 1))"
}

requeue() {
    say "job $JOB: $1; requeued"
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60 & wait $! # SLURM ends this script now
    else
        say "job $JOB: scontrol requeue was refused; submit the same command again to go on"
    fi
}

first_error() {
    local line
    line=$(grep -hE '^(\[[^]]*\] *)?(error:|[A-Za-z]*Error)' "$LOGS"/rank-*.txt "$LOGS/srun.txt" 2>/dev/null | head -n 1)
    echo "${line:-see $LOGS}"
}
