job_environment() {
    export STORAGE_PATH="$DEEPSQUARE_STORAGE"
    export NTASKS=4
    export CPUS_PER_TASK=1
    export MEM_PER_CPU=100
    export GPUS_PER_TASK=0
    export GPUS=0
    export CPUS=4
    export MEM=400
    export DEEPSQUARE_TASKS=4
    export DEEPSQUARE_CPUS_PER_TASK=1
    export DEEPSQUARE_MEM_PER_CPU=100
    export DEEPSQUARE_GPUS=0
    export DEEPSQUARE_JOB_ID=7
    DEEPSQUARE_CONTAINER_ENV=(NTASKS CPUS_PER_TASK MEM_PER_CPU GPUS_PER_TASK GPUS CPUS MEM DEEPSQUARE_TASKS DEEPSQUARE_CPUS_PER_TASK DEEPSQUARE_MEM_PER_CPU DEEPSQUARE_GPUS DEEPSQUARE_JOB_ID STORAGE_PATH DEEPSQUARE_INPUT DEEPSQUARE_OUTPUT DEEPSQUARE_ENV DEEPSQUARE_ERROR_CODE DEEPSQUARE_TMP DEEPSQUARE_SHARED_TMP DEEPSQUARE_SHARED_WORLD_TMP DEEPSQUARE_DISK_TMP DEEPSQUARE_DISK_WORLD_TMP)
    load_env
}
step_1() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c 'ip address'
}
step_2() {
    run_in_subshell step_1
}
step_3() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 9.9.9.9' 'nameserver 2001:db8::53' || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" 77 78
    set -- "$@" /bin/sh
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    mkdir -p /srv && cd /srv || exit
    exec "$@" -c 'ip address'
}
step_4() {
    run_in_subshell step_3
}
step_5() {
    if [[ -n ${SLURM_JOB_ID-} ]]; then set -- srun --ntasks=1 --cpus-per-task=1 --mem-per-cpu=100 --gpus-per-task=0; else set --; fi
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    network_file wg0.wireguard '[Interface]' $'PrivateKey = it\'s "private" $(touch /tmp/x)' '[Peer]' 'PublicKey = PEER' 'PresharedKey = SHARED' 'AllowedIPs = 0.0.0.0/0, ::/0' 'Endpoint = vpn.example:51820' 'PersistentKeepalive = 10' '[Peer]' 'PublicKey = OTHER' 'AllowedIPs = 198.51.100.7/24, 198.51.100.0/24' || exit
    network_file wg0.addresses 192.0.2.2/32 fd01::2/128 || exit
    network_file wg0.routes 0.0.0.0/1 128.0.0.0/1 ::/1 8000::/1 198.51.100.0/24 || exit
    network_file wg1.wireguard '[Interface]' 'PrivateKey = SECOND' || exit
    network_file wg1.addresses || exit
    network_file wg1.routes || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" 0 0
    set -- "$@" "$BASH"
    job_environment
    export GPUS_PER_TASK=0
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c 'ping 192.0.2.1'
}
step_6() {
    run_in_subshell step_5
}
step_7() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    join_virtual_network vnet0 0 0 10.7.0.2/24 10.7.0.0/24 || exit
    join_virtual_network vnet1 2 0 fd00::2/64 fd00::/64 || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c serve
}
step_8() {
    run_in_subshell step_7
}
step_9() {
    step_8 || return
}
step_10() {
    launch step_9 '' ''
}
step_11() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    join_virtual_network vnet0 0 1 10.7.0.3/24 10.7.0.0/24 || exit
    network_file bore0.bore bore.example 2200 8080 '' || exit
    network_file bore1.bore bore.example 2201 8081 $'to\'ken' || exit
    network_file bore.py "$BORE_CLIENT" || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c visit
}
step_12() {
    run_in_subshell step_11
}
step_13() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    join_virtual_network vnet0 0 0 10.7.0.2/24 10.7.0.0/24 || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    set -- "$@" "$BASH"
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    exec "$@" -c again
}
step_14() {
    run_in_subshell step_13
}
step_15() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    network_file bore0.bore 2001:db8::1 2200 80 '' || exit
    network_file bore.py "$BORE_CLIENT" || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    charliecloud_image registry docker.io/library/alpine || exit
    exec "$@" ch-run --write --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_IMAGE" -- /bin/sh -c ls
}
step_16() {
    run_in_subshell step_15
}
step_17() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    join_virtual_network vnet0 0 2 10.7.0.4/24 10.7.0.0/24 || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi
    exec "$@" apptainer --silent exec --no-mount=cwd,tmp --writable-tmpfs --bind "$DEEPSQUARE_STORAGE:/deepsquare" --bind "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --bind "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --bind "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --bind "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --no-home "${DEEPSQUARE_OPTIONS[@]}" docker://docker.io/library/alpine /bin/sh -c ls
}
step_18() {
    run_in_subshell step_17
}
step_19() {
    set --
    network_folder || exit
    network_file resolv.conf 'nameserver 169.254.254.3' || exit
    network_program || exit
    set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" '' ''
    job_environment
    cd "$DEEPSQUARE_STORAGE" || exit
    set_container_folders || exit
    mapfile -t DEEPSQUARE_OPTIONS < <(container_variables | sed 's/^/--env=/')
    enroot_image registry 'docker://registry-1.docker.io#library/alpine' || exit
    enroot_startup 'if [ $# -gt 0 ]; then exec "$@"; fi' || exit
    exec "$@" enroot start --rw --mount "$DEEPSQUARE_STORAGE:/deepsquare" --mount "$DEEPSQUARE_HOST_SHARED:/deepsquare/tmp" --mount "$DEEPSQUARE_HOST_WORLD:/deepsquare/world-tmp" --mount "$DEEPSQUARE_HOST_DISK:/deepsquare/disk/tmp" --mount "$DEEPSQUARE_HOST_DISK_WORLD:/deepsquare/disk/world-tmp" --mount "$DEEPSQUARE_STARTUP:/etc/rc.local:x-create=file,bind,ro" "${DEEPSQUARE_OPTIONS[@]}" "$DEEPSQUARE_IMAGE" /bin/sh -c ls
}
step_20() {
    run_in_subshell step_19
}
step_21() {
    step_2 || return
    step_4 || return
    step_6 || return
    step_10 || return
    step_12 || return
    step_14 || return
    step_16 || return
    step_18 || return
    step_20 || return
}
step_22() {
    run_and_wait step_21
}
end_job() {
    local code=$1
    trap - EXIT
    trap : TERM INT
    stop_virtual_networks
    remove_folders
    exit "$code"
}
create_folders .deepsquare
HUBS=()
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'end_job "$?"' EXIT
start_virtual_network 0 10.7.0.1/24 10.7.0.0/24 10.7.0.2 10.7.0.3 10.7.0.4 || exit
start_virtual_network 2 fd00::1/64 fd00::/64 fd00::2 || exit
step_22
exit
