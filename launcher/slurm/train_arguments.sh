# The command line of launcher/train.py out of a job script's: what it leaves open is filled in. Sourced behind job.sh.

# Sets `arguments`, and CHECKPOINTS (of the run, for counting losses).
train_arguments() {
    arguments=("$@")
    has --deepspeed "$@" || arguments=(--deepspeed ds_configs/zero2.json "${arguments[@]}")
    # The same line starts the run and goes on with it. A folder that holds anything else is still refused.
    has run.resume "$@" || arguments+=(run.resume=auto)
    if [ -n "${CACHE_DIR:-}" ] && ! has data.cache_dir "$@"; then arguments+=("data.cache_dir=$CACHE_DIR"); fi
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
