# shellcheck shell=bash
# The Python scripts' command lines out of those of the job scripts. Sourced behind job.sh; most set `arguments`.

# launcher/train.py's: what is left open is filled in. Also sets CHECKPOINTS (of the run, for counting losses).
train_arguments() {
    arguments=("$@")
    has --deepspeed "$@" || arguments=(--deepspeed ds_configs/zero2.json "${arguments[@]}")
    # The same line starts the run and goes on with it. A folder that holds anything else is still refused.
    has run.resume "$@" || arguments+=(run.resume=auto)
    add_cache_dir "$@"
    local argument folder='' name='' recipe=quickstart
    for argument in "$@"; do
        case ${argument#--} in
            run.dir=*) folder=${argument#*=} ;;
            run.name=*) name=${argument#*=} ;;
            recipe=*) recipe=${argument#*=} ;;
        esac
    done
    CHECKPOINTS=${folder:-runs/${name:-$recipe}}/checkpoints
}

# CACHE_DIR of the site, unless the arguments name another.
add_cache_dir() {
    if [ -n "${CACHE_DIR:-}" ] && ! has data.cache_dir "$@"; then arguments+=("data.cache_dir=$CACHE_DIR"); fi
}

# Line SLURM_ARRAY_TASK_ID of the file $1, split as a shell would split it (quotes keep spaces), behind the others.
read_sweep_line() {
    local file=${1:-} line own
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:-0}p" "$file" 2>/dev/null)
    if [ -z "$line" ]; then
        echo "error: sweep: found no line ${SLURM_ARRAY_TASK_ID:-0} in '$file'; sbatch --array=1-N sweep.sbatch FILE" >&2
        exit $USER_ERROR
    fi
    shift
    mapfile -t own < <(xargs -n 1 printf '%s\n' <<< "$line")
    arguments=("$@" "${own[@]}")
}

# The pairs of `tasks` and `seeds` for this task of the array: every n-th, as "TASK SEED" in `pairs`. Also sets `place`
# (of this task in the array, from 0) and `places` (how many there are).
deal_out_pairs() {
    place=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0})) places=${SLURM_ARRAY_TASK_COUNT:-1} pairs=()
    local number
    for ((number = place; number < ${#tasks[@]} * ${#seeds[@]}; number += places)); do
        pairs+=("${tasks[number / ${#seeds[@]}]} ${seeds[number % ${#seeds[@]}]}")
    done
}

# Whether option or field $1 is among the other arguments: NAME, --NAME, NAME=..., --NAME=...
has() {
    local name=${1#--} argument
    shift
    for argument in "$@"; do
        argument=${argument#--}
        [ "${argument%%=*}" != "$name" ] || return 0
    done
    return 1
}
