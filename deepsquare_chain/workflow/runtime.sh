# Functions of every job's script. Text of the customer is data here, never code.

# Creates the folders of a job in the current folder, and sets their variables. Argument: name of the folder for
# the script's own files.
create_folders() {
    local umask mode
    unset DEEPSQUARE_ERROR_CODE
    DEEPSQUARE_CONTAINER_ENV=()
    readonly DEEPSQUARE_STORAGE=$PWD DEEPSQUARE_STATE=$PWD/$1
    export DEEPSQUARE_INPUT=$PWD/input DEEPSQUARE_OUTPUT=$PWD/output DEEPSQUARE_ENV=$PWD/env
    # The job's environment may name caches that the provider keeps after the job.
    export DEEPSQUARE_SHARED_TMP=${DEEPSQUARE_SHARED_TMP:-$DEEPSQUARE_STATE/user}
    export DEEPSQUARE_SHARED_WORLD_TMP=${DEEPSQUARE_SHARED_WORLD_TMP:-$DEEPSQUARE_STATE/world}
    export DEEPSQUARE_DISK_TMP=${DEEPSQUARE_DISK_TMP:-$DEEPSQUARE_STATE/disk}
    export DEEPSQUARE_DISK_WORLD_TMP=${DEEPSQUARE_DISK_WORLD_TMP:-$DEEPSQUARE_STATE/disk-world}
    export DEEPSQUARE_TMP=$DEEPSQUARE_SHARED_TMP
    # One mkdir: the mode is that of the folders, and the umask that of DEEPSQUARE_STATE around them.
    umask >./env && read -r umask <./env && : >./env || exit
    printf -v mode %o "$((0777 & ~8#$umask))"
    umask 077
    # shellcheck disable=SC2174
    mkdir -p -m "$mode" input output "$DEEPSQUARE_STATE"/{user,world,disk,disk-world} || exit
    umask "$umask"
}

# Removes what the script created, and the folders of the job that are empty.
remove_folders() {
    local path folders=()
    cd "$DEEPSQUARE_STORAGE" || return
    for path in "$DEEPSQUARE_STATE"/* "$DEEPSQUARE_STATE" disk/* disk tmp world-tmp input output; do
        if [[ -d $path && ! -L $path ]]; then folders+=("$path"); fi
    done
    rm -f -d ./env ./env.module-* "${folders[@]}" 2>/dev/null
    if [[ -e $DEEPSQUARE_STATE ]]; then rm -rf "$DEEPSQUARE_STATE"; fi
}

# Makes a subshell exit when the job is terminated. Bash waits for its current command first, which receives the
# signal as well, so that steps under `finally` can finish.
exit_on_signals() {
    set +m
    trap 'exit 143' TERM
    trap 'exit 130' INT
}

# Exports what steps wrote to $DEEPSQUARE_ENV: lines NAME=value, lines from NAME<<END to END, and
# lines that continue the value before them. Names of the grid and of bash itself are left out.
load_env() {
    local line="" name="" value="" end="" is_first=0
    [[ -f $DEEPSQUARE_ENV && -r $DEEPSQUARE_ENV ]] || return 0
    while IFS= read -r line || [[ -n $line ]]; do
        if [[ -n $end ]]; then
            if [[ $line == "$end" ]]; then
                export_value "$name" "$value"
                end="" name=""
            elif ((is_first)); then
                value=$line is_first=0
            else
                value+=$'\n'$line
            fi
        elif [[ $line == *=* && ${line%%=*} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
            export_trimmed "$name" "$value"
            name=${line%%=*} value=${line#*=}
        elif [[ $line == *"<<"?* && ${line%%"<<"*} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
            export_trimmed "$name" "$value"
            name=${line%%"<<"*} end=${line#*"<<"} value="" is_first=1
        elif [[ -n $name ]]; then
            value+=$'\n'$line
        fi
    done <"$DEEPSQUARE_ENV"
    if [[ -z $end ]]; then export_trimmed "$name" "$value"; fi
}

# Exports a value without the empty lines at its end.
export_trimmed() {
    local text=$2
    while [[ $text == *$'\n' ]]; do text=${text%$'\n'}; done
    export_value "$1" "$text"
}

export_value() {
    case $1 in
    "" | DEEPSQUARE_* | STORAGE_PATH | BASHOPTS | BASH_VERSINFO | EUID | PPID | SHELLOPTS | UID) ;;
    *)
        declare -gx -- "$1=$2"
        DEEPSQUARE_CONTAINER_ENV+=("$1")
        ;;
    esac
}

# Waits for launched steps by their handles; fails with the code of the first that failed. A step that its condition
# skipped is not waited for.
wait_for_handles() {
    local handle variable code
    for handle; do
        variable=HANDLE_$handle
        if [[ -z ${!variable-} ]]; then continue; fi
        until [[ -e ${!variable} ]]; do sleep 0.1; done
        code=$(<"${!variable}")
        if [[ $code != 0 ]]; then
            echo "The launched step $handle failed with exit code $code." >&2
            return "$code"
        fi
    done
}

# Runs a step in the background, in a process group of its own.
# Arguments: function, handle or nothing, signal at the end of the enclosing steps or nothing.
launch() {
    # Iterations of a loop launch under the same handle: each has a file of its own.
    local end=$DEEPSQUARE_STATE/end.$BASHPID.${#LAUNCHED[@]}
    if [[ -n $2 ]]; then declare -g "HANDLE_$2=$end"; fi
    set -m
    run_launched "$1" "$end" &
    set +m
    LAUNCHED+=("$!")
    SIGNALS+=("$3")
}

run_launched() {
    exit_on_signals
    END_FILE=$2
    trap 'write_exit_code "$END_FILE" "$?"' EXIT
    "$1"
    exit
}

# Writes the exit code of a launched step for `wait_for_handles`, atomically.
# Arguments: file, code.
write_exit_code() {
    trap - EXIT
    echo "$2" >"$1.new" && mv "$1.new" "$1"
    exit "$2"
}

# Runs steps, and waits for the steps that they launched. If a step fails, the launched steps are terminated.
run_and_wait() (
    exit_on_signals
    LAUNCHED=() SIGNALS=()
    trap 'signal_launched TERM; wait; exit 143' TERM
    "$1"
    code=$?
    if ((code)); then
        signal_launched TERM
        for pid in "${LAUNCHED[@]}"; do wait "$pid"; done
        exit "$code"
    fi
    for index in "${!LAUNCHED[@]}"; do
        signal=${SIGNALS[index]:-0}
        if [[ $signal != 0 ]]; then kill "-$signal" -- "-${LAUNCHED[index]}"; fi 2>/dev/null
        wait "${LAUNCHED[index]}"
        status=$?
        # A step that ends by the signal of the job file has not failed.
        if [[ $signal != 0 && $status -gt 128 ]]; then status=0; fi
        if ((code == 0)); then code=$status; fi
    done
    exit "$code"
)

signal_launched() {
    local pid
    for pid in "${LAUNCHED[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null; done
    return 0
}

# Runs a step, its `catch` if it failed, and its `finally` in any case. The exit code is that of the step; if the step
# succeeded, that of its `finally`.
# Arguments: three functions, of which the last two may be empty.
run_with_handlers() (
    exit_on_signals
    IS_TERMINATED=0 CATCH=$2 FINALLY=$3
    trap 'IS_TERMINATED=1; exit 143' TERM
    trap 'run_handlers "$CATCH" "$FINALLY"' EXIT
    run_in_subshell "$1"
    exit
)

run_handlers() {
    export DEEPSQUARE_ERROR_CODE=$?
    trap - EXIT
    trap : TERM INT
    local code=$DEEPSQUARE_ERROR_CODE
    if ((code && !IS_TERMINATED)) && [[ -n $1 ]]; then run_in_subshell "$1"; fi
    if [[ -n $2 ]]; then
        run_in_subshell "$2"
        local status=$?
        if ((code == 0)); then code=$status; fi
    fi
    exit "$code"
}

run_in_subshell() (
    exit_on_signals
    "$1"
)

# Like `run_in_subshell`, in a shell that runs in the background already.
run_in_background() {
    exit_on_signals
    "$1"
    exit
}

# Waits for all iterations of a parallel loop; fails with the code of the first that failed.
wait_for_iterations() {
    local pid status code=0
    for pid; do
        wait "$pid"
        status=$?
        if ((code == 0)); then code=$status; fi
    done
    return "$code"
}

# Returns 0 if a condition is true, 1 if it is false. The test itself exits with 10 or 11; any other code is an error
# of the test.
test_condition() {
    local code
    run_in_subshell "$1"
    code=$?
    case $code in
    10) return 0 ;;
    11) return 1 ;;
    *)
        echo "The condition of a step can't be evaluated." >&2
        return 2
        ;;
    esac
}

# Exports the outputs of a module to the steps after it.
# Arguments: file, prefix, names of the outputs.
export_outputs() (
    file=$1 prefix=$2
    shift 2
    DEEPSQUARE_CONTAINER_ENV=()
    load_env
    for name; do
        if [[ -n ${!name+x} ]]; then
            printf '%s_%s<<%s\n%s\n%s\n' "$prefix" "$name" END_OF_OUTPUT "${!name}" END_OF_OUTPUT >>"$file"
        fi
    done
)
