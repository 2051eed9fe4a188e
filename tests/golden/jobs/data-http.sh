job_environment() {
    export STORAGE_PATH="$DEEPSQUARE_STORAGE"
    export NTASKS=1
    export CPUS_PER_TASK=1
    export MEM_PER_CPU=100
    export GPUS_PER_TASK=0
    export GPUS=0
    export CPUS=1
    export MEM=100
    export DEEPSQUARE_TASKS=1
    export DEEPSQUARE_CPUS_PER_TASK=1
    export DEEPSQUARE_MEM_PER_CPU=100
    export DEEPSQUARE_GPUS=0
    export DEEPSQUARE_JOB_ID=7
    DEEPSQUARE_CONTAINER_ENV=(NTASKS CPUS_PER_TASK MEM_PER_CPU GPUS_PER_TASK GPUS CPUS MEM DEEPSQUARE_TASKS DEEPSQUARE_CPUS_PER_TASK DEEPSQUARE_MEM_PER_CPU DEEPSQUARE_GPUS DEEPSQUARE_JOB_ID STORAGE_PATH DEEPSQUARE_INPUT DEEPSQUARE_OUTPUT DEEPSQUARE_ENV DEEPSQUARE_ERROR_CODE DEEPSQUARE_TMP DEEPSQUARE_SHARED_TMP DEEPSQUARE_SHARED_WORLD_TMP DEEPSQUARE_DISK_TMP DEEPSQUARE_DISK_WORLD_TMP)
    load_env
}
step_1() {
    set --
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c ls
}
step_2() {
    run_in_subshell step_1
}
step_3() {
    step_2 || return
}
step_4() {
    exit_on_signals
    local config file
    config=$DEEPSQUARE_STATE/address
    (umask 077 && printf '%s\n' 'url = "https://user:password@files.example/input.tar.gz?key=\"value\""' >"$config") || exit
    file="$DEEPSQUARE_INPUT/"input.tar.gz
    retry download_url "$config" "$file" || exit
    extract_archive "$file" "$DEEPSQUARE_INPUT" || exit
    chmod -R 755 "$DEEPSQUARE_INPUT"
}
step_5() {
    local config file
    config=$DEEPSQUARE_STATE/address
    (umask 077 && printf '%s\n' 'url = "https://files.example/"' >"$config") || exit
    retry upload_output "$config" "$DEEPSQUARE_OUTPUT"
}
end_job() {
    local code=$1
    trap - EXIT
    trap : TERM INT
    run_in_subshell step_5 || code=$((code ? code : $?))
    remove_folders
    exit "$code"
}
create_folders .deepsquare
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'end_job "$?"' EXIT
run_in_subshell step_4 || exit
step_3
exit
