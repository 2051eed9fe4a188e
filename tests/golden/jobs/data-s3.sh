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
    DEEPSQUARE_PASSED=(NTASKS CPUS_PER_TASK MEM_PER_CPU GPUS_PER_TASK GPUS CPUS MEM DEEPSQUARE_TASKS DEEPSQUARE_CPUS_PER_TASK DEEPSQUARE_MEM_PER_CPU DEEPSQUARE_GPUS DEEPSQUARE_JOB_ID STORAGE_PATH DEEPSQUARE_INPUT DEEPSQUARE_OUTPUT DEEPSQUARE_ENV DEEPSQUARE_ERROR_CODE DEEPSQUARE_TMP DEEPSQUARE_SHARED_TMP DEEPSQUARE_SHARED_WORLD_TMP DEEPSQUARE_DISK_TMP DEEPSQUARE_DISK_WORLD_TMP)
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
    run_inner step_1
}
step_3() {
    step_2 || return
}
step_4() {
    obey_signals
    export AWS_ACCESS_KEY_ID=key
    export AWS_SECRET_ACCESS_KEY=$'sec\'ret'
    export AWS_REGION=eu
    export S3_ENDPOINT_URL=https://s3.example
    persist pull_bucket s3://data/in "$DEEPSQUARE_INPUT" eu || exit
    chmod -R 700 "$DEEPSQUARE_INPUT"
}
step_5() {
    export AWS_ACCESS_KEY_ID=key
    export AWS_SECRET_ACCESS_KEY=secret
    export AWS_REGION=eu
    export S3_ENDPOINT_URL=https://s3.example
    while :; do
        sleep 5 & wait $!
        push_bucket "$DEEPSQUARE_OUTPUT" s3://data/ eu 2>/dev/null
    done
}
step_6() {
    export AWS_ACCESS_KEY_ID=key
    export AWS_SECRET_ACCESS_KEY=secret
    export AWS_REGION=eu
    export S3_ENDPOINT_URL=https://s3.example
    persist push_bucket "$DEEPSQUARE_OUTPUT" s3://data/ eu --delete
}
unset DEEPSQUARE_ERROR_CODE
DEEPSQUARE_PASSED=()
readonly DEEPSQUARE_STORAGE=$PWD DEEPSQUARE_STATE=$PWD/.deepsquare
mkdir -p input output "$DEEPSQUARE_STATE"/{user,world,disk,disk-world} || exit
chmod 700 "$DEEPSQUARE_STATE" || exit
: >./env || exit
export DEEPSQUARE_INPUT=$PWD/input DEEPSQUARE_OUTPUT=$PWD/output
export DEEPSQUARE_ENV=$PWD/env
export DEEPSQUARE_SHARED_TMP=${DEEPSQUARE_SHARED_TMP:-$DEEPSQUARE_STATE/user}
export DEEPSQUARE_SHARED_WORLD_TMP=${DEEPSQUARE_SHARED_WORLD_TMP:-$DEEPSQUARE_STATE/world}
export DEEPSQUARE_DISK_TMP=${DEEPSQUARE_DISK_TMP:-$DEEPSQUARE_STATE/disk}
export DEEPSQUARE_DISK_WORLD_TMP=${DEEPSQUARE_DISK_WORLD_TMP:-$DEEPSQUARE_STATE/disk-world}
export DEEPSQUARE_TMP=$DEEPSQUARE_SHARED_TMP
trap 'ended=143' TERM
trap 'ended=130' INT
ended="" code=0
run_inner step_4 || code=$?
syncing=""
if ((code == 0)); then
    run_async step_5 &
    syncing=$!
fi
if ((code == 0)); then run_inner step_3 || code=$?; fi
code=${ended:-$code}
if [[ -n $syncing ]]; then kill "$syncing"; wait "$syncing"; fi 2>/dev/null
run_inner step_6 || code=$((code ? code : $?))
cd "$DEEPSQUARE_STORAGE" && rm -rf "$DEEPSQUARE_STATE"
rmdir disk/* disk tmp world-tmp input output 2>/dev/null
rm -f ./env ./env.module-*
exit "$code"
