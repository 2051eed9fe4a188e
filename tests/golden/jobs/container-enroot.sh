job_environment() {
    export STORAGE_PATH="$DEEPSQUARE_STORAGE"
    export NTASKS=2
    export CPUS_PER_TASK=1
    export MEM_PER_CPU=100
    export GPUS_PER_TASK=0
    export GPUS=0
    export CPUS=2
    export MEM=200
    export DEEPSQUARE_TASKS=2
    export DEEPSQUARE_CPUS_PER_TASK=1
    export DEEPSQUARE_MEM_PER_CPU=100
    export DEEPSQUARE_GPUS=0
    export DEEPSQUARE_JOB_ID=7
    DEEPSQUARE_CONTAINER_ENV=(NTASKS CPUS_PER_TASK MEM_PER_CPU GPUS_PER_TASK GPUS CPUS MEM DEEPSQUARE_TASKS DEEPSQUARE_CPUS_PER_TASK DEEPSQUARE_MEM_PER_CPU DEEPSQUARE_GPUS DEEPSQUARE_JOB_ID STORAGE_PATH DEEPSQUARE_INPUT DEEPSQUARE_OUTPUT DEEPSQUARE_ENV DEEPSQUARE_ERROR_CODE DEEPSQUARE_TMP DEEPSQUARE_SHARED_TMP DEEPSQUARE_SHARED_WORLD_TMP DEEPSQUARE_DISK_TMP DEEPSQUARE_DISK_WORLD_TMP)
    load_env
}
step_1() {
    set --
    job_environment
    export STEP=$'it\'s'
    cd "$DEEPSQUARE_STORAGE" || exit
    DEEPSQUARE_CONTAINER_ENV+=(STEP)
    set_container_folders || exit
    registry_login enroot registry.example $'user:pass\'word' || exit
    mapfile -t DEEPSQUARE_OPTIONS < <(container_variables | sed 's/^/--env=/')
    enroot_image registry 'docker://registry.example#user/app:1' || exit
    enroot_startup 'if [ $# -gt 0 ]; then exec "$@"; fi' || exit
    exec "$@" enroot start --mount "$DEEPSQUARE_STORAGE:/deepsquare" --mount "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --mount "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --mount "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --mount "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --mount "$HOME:$HOME" --mount /tmp/.X11-unix:/tmp/.X11-unix:ro,x-create=dir,bind --mount /opt/data:/data:x-create=auto,bind,ro --mount "$DEEPSQUARE_STARTUP:/etc/rc.local:x-create=file,bind,ro" "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_IMAGE" /bin/sh -c 'mkdir -p -- "$1" && cd -- "$1" && shift && exec "$@"' enter /app /bin/sh -c 'ls "a b"'
}
step_2() {
    run_in_subshell step_1
}
step_3() {
    if [[ -n ${SLURM_JOB_ID-} ]]; then set -- srun --ntasks=2 --cpus-per-task=1 --mem-per-cpu=100; else set -- mpirun --allow-run-as-root --oversubscribe -n 2; fi
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    mapfile -t DEEPSQUARE_OPTIONS < <(container_variables | sed 's/^/--env=/')
    enroot_image file "$DEEPSQUARE_STORAGE"/image || exit
    enroot_startup 'if [ $# -gt 0 ]; then exec "$@"; fi' || exit
    exec "$@" enroot start --rw --mount "$DEEPSQUARE_STORAGE:/deepsquare" --mount "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --mount "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --mount "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --mount "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --mount "$DEEPSQUARE_STARTUP:/etc/rc.local:x-create=file,bind,ro" "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_IMAGE" /bin/sh -c ls
}
step_4() {
    run_in_subshell step_3
}
step_5() {
    set --
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    mapfile -t DEEPSQUARE_OPTIONS < <(container_variables | sed 's/^/--env=/')
    enroot_image registry 'docker://registry-1.docker.io#library/alpine@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef' || exit
    enroot_startup 'if [ $# -gt 0 ]; then exec "$@"; fi' || exit
    exec "$@" enroot start --rw --mount "$DEEPSQUARE_STORAGE:/deepsquare" --mount "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --mount "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --mount "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --mount "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --root --mount "$DEEPSQUARE_STARTUP:/etc/rc.local:x-create=file,bind,ro" "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_IMAGE" /bin/ash -c ls
}
step_6() {
    run_in_subshell step_5
}
step_7() {
    set --
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    mapfile -t DEEPSQUARE_OPTIONS < <(container_variables | sed 's/^/--env=/')
    enroot_image registry 'docker://registry-1.docker.io#user/app' || exit
    enroot_startup 'mkdir -p -- /srv && cd -- /srv || exit' || exit
    exec "$@" enroot start --rw --mount "$DEEPSQUARE_STORAGE:/deepsquare" --mount "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --mount "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --mount "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --mount "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --mount "$DEEPSQUARE_STARTUP:/etc/rc.local:x-create=file,bind,ro" "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_IMAGE" serve --name 'a b'
}
step_8() {
    run_in_subshell step_7
}
step_9() {
    step_2 || return
    step_4 || return
    step_6 || return
    step_8 || return
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
step_9
exit
