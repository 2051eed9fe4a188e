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
    export AWS_ACCESS_KEY_ID=key
    export AWS_SECRET_ACCESS_KEY=$'sec\'ret'
    export AWS_REGION=eu
    export S3_ENDPOINT_URL=https://s3.example
    retry download_bucket s3://data/in "$DEEPSQUARE_INPUT" eu || exit
    chmod -R 700 "$DEEPSQUARE_INPUT"
}
step_5() {
    export AWS_ACCESS_KEY_ID=key
    export AWS_SECRET_ACCESS_KEY=secret
    export AWS_REGION=eu
    export S3_ENDPOINT_URL=https://s3.example
    while :; do
        sleep 5 & wait $!
        upload_bucket "$DEEPSQUARE_OUTPUT" s3://data/ eu 2>/dev/null
    done
}
step_6() {
    export AWS_ACCESS_KEY_ID=key
    export AWS_SECRET_ACCESS_KEY=secret
    export AWS_REGION=eu
    export S3_ENDPOINT_URL=https://s3.example
    retry upload_bucket "$DEEPSQUARE_OUTPUT" s3://data/ eu --delete
}
end_job() {
    local code=$1
    trap - EXIT
    trap : TERM INT
    if [[ -n $SYNC ]]; then kill "$SYNC"; wait "$SYNC"; fi 2>/dev/null
    run_in_subshell step_6 || code=$((code ? code : $?))
    remove_folders
    exit "$code"
}
create_folders .deepsquare
SYNC=""
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'end_job "$?"' EXIT
run_in_subshell step_4 || exit
run_in_background step_5 &
SYNC=$!
step_3
exit
