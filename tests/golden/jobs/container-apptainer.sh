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
    registry_login apptainer registry.example $'user:pass\'word' || exit
    if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi
    exec "$@" apptainer --silent exec --no-mount=cwd,tmp --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --bind /tmp/.X11-unix:/tmp/.X11-unix:ro --bind /opt/data:/data:ro "${DEEPSQUARE_OPTIONS[@]}" docker://registry.example/user/app:1 /bin/sh -c 'mkdir -p -- "$1" && cd -- "$1" && shift && exec "$@"' enter /app /bin/sh -c 'ls "a b"'
}
step_2() {
    run_in_subshell step_1
}
step_3() {
    if [[ -n ${SLURM_JOB_ID-} ]]; then set -- srun --ntasks=2 --cpus-per-task=1 --mem-per-cpu=100; else set -- mpirun --allow-run-as-root --oversubscribe -n 2; fi
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi
    exec "$@" apptainer --silent exec --no-mount=cwd,tmp --writable-tmpfs --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --no-home "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_STORAGE"/image /bin/sh -c ls
}
step_4() {
    run_in_subshell step_3
}
step_5() {
    set --
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi
    exec "$@" apptainer --silent exec --no-mount=cwd,tmp --writable-tmpfs --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --no-home --fakeroot "${DEEPSQUARE_OPTIONS[@]}" docker://docker.io/library/alpine@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef /bin/ash -c ls
}
step_6() {
    run_in_subshell step_5
}
step_7() {
    set --
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi
    exec "$@" apptainer --silent exec --no-mount=cwd,tmp --writable-tmpfs --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --no-home "${DEEPSQUARE_OPTIONS[@]}" /opt/software/registry.example/library/app:1 /bin/sh -c ls
}
step_8() {
    run_in_subshell step_7
}
step_9() {
    set --
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi
    exec "$@" apptainer --silent run --no-mount=cwd,tmp --writable-tmpfs --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --no-home --pwd /srv "${DEEPSQUARE_OPTIONS[@]}" docker://docker.io/user/app serve --name 'a b'
}
step_10() {
    run_in_subshell step_9
}
step_11() {
    step_2 || return
    step_4 || return
    step_6 || return
    step_8 || return
    step_10 || return
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
step_11
exit
