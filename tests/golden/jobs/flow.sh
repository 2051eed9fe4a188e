job_environment() {
    export QUOTED=$'it\'s $(here)'
    export LINES=$'one\ntwo'
    export STORAGE_PATH="$DEEPSQUARE_STORAGE"
    export NTASKS=4
    export CPUS_PER_TASK=2
    export MEM_PER_CPU=100
    export GPUS_PER_TASK=1
    export GPUS=4
    export CPUS=8
    export MEM=800
    export DEEPSQUARE_TASKS=4
    export DEEPSQUARE_CPUS_PER_TASK=2
    export DEEPSQUARE_MEM_PER_CPU=100
    export DEEPSQUARE_GPUS=4
    export DEEPSQUARE_JOB_ID=7
    DEEPSQUARE_CONTAINER_ENV=(QUOTED LINES NTASKS CPUS_PER_TASK MEM_PER_CPU GPUS_PER_TASK GPUS CPUS MEM DEEPSQUARE_TASKS DEEPSQUARE_CPUS_PER_TASK DEEPSQUARE_MEM_PER_CPU DEEPSQUARE_GPUS DEEPSQUARE_JOB_ID STORAGE_PATH DEEPSQUARE_INPUT DEEPSQUARE_OUTPUT DEEPSQUARE_ENV DEEPSQUARE_ERROR_CODE DEEPSQUARE_TMP DEEPSQUARE_SHARED_TMP DEEPSQUARE_SHARED_WORLD_TMP DEEPSQUARE_DISK_TMP DEEPSQUARE_DISK_WORLD_TMP)
    load_env
}
step_1() {
    set --
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c 'sleep 60'
}
step_2() {
    run_in_subshell step_1
}
step_3() {
    step_2 || return
}
step_4() {
    launch step_3 SERVER 15
}
step_5() {
    set -- "$BASH"
    job_environment
    exec "$1" -c 'if [[ $QUOTED != x ]]; then exit 10; else exit 11; fi'
}
step_6() {
    if [[ -n ${SLURM_JOB_ID-} ]]; then set -- srun --ntasks=2 --cpus-per-task=1 --mem-per-cpu=50 --gpus-per-task=1 --mpi=pmix_v4 --cpu-bind=none; else set -- mpirun --allow-run-as-root --oversubscribe -n 2; fi
    set -- "$@" unshare --user --map-user=0 --map-group=0 /bin/bash
    job_environment
    export GPUS_PER_TASK=1
    export STEP=a,b
    cd "$DEEPSQUARE_STORAGE" || exit
    mkdir -p $'/work/it\'s' && cd $'/work/it\'s' || exit
    exec "$@" -c ./main
}
step_7() {
    set --
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c 'echo "$DEEPSQUARE_ERROR_CODE"'
}
step_8() {
    run_in_subshell step_7
}
step_9() {
    step_8 || return
}
step_10() {
    set --
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c 'echo done'
}
step_11() {
    run_in_subshell step_10
}
step_12() {
    step_11 || return
}
step_13() {
    run_with_handlers step_6 step_9 step_12
}
step_14() {
    wait_for_handles SERVER || return
    test_condition step_5 || return $(($? == 1 ? 0 : $?))
    run_in_subshell step_13
}
step_15() {
    set --
    set -- "$@" "$BASH"
    job_environment
    export index="$DEEPSQUARE_INDEX"
    export item="$DEEPSQUARE_ITEM"
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c 'echo "$index $item"'
}
step_16() {
    run_in_subshell step_15
}
step_17() {
    step_16 || return
}
step_18() {
    local item
    for item in $'a b\'s'; do
        DEEPSQUARE_ITEM=$item
        run_in_subshell step_17 || return
    done
}
step_19() {
    run_in_subshell step_18
}
step_20() {
    step_19 || return
}
step_21() {
    local index pids=()
    trap 'wait; exit 143' TERM
    for ((index = 3; index >= 1; index += -1)); do
        DEEPSQUARE_INDEX=$index
        run_in_background step_20 &
        pids+=("$!")
    done
    wait_for_iterations "${pids[@]}"
}
step_22() {
    run_in_subshell step_21
}
step_23() {
    step_4 || return
    step_14 || return
    step_22 || return
}
step_24() {
    run_and_wait step_23
}
end_job() {
    local code=$1
    trap - EXIT
    trap : TERM INT
    remove_folders
    exit "$code"
}
create_folders .deepsquare
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'end_job "$?"' EXIT
step_24
exit
