# shellcheck shell=bash disable=SC2329
# Tests the abilities of jobs, and prints one line for each: "ability NAME yes" or "ability NAME no REASON".
# It runs like a job, so that its results hold for jobs.

try() {
    local name=$1 output
    shift
    if output=$(timeout 60 bash -c 'set -e; "$@"' try "$@" 2>&1 </dev/null); then
        echo "ability $name yes"
    else
        output=$(tail -n 1 <<<"$output" | tr -c '[:print:]' ' ')
        echo "ability $name no ${output:-it fails without a message}"
        return 1
    fi
}

has() {
    local program
    for program; do
        command -v "$program" >/dev/null || { echo "$program is not installed" && return 1; }
    done
}

can_nest() {
    has unshare && { unshare --user true 2>/dev/null ||
        { echo "jobs can't create user namespaces: the executor's option namespaces is off, or the kernel forbids it" && return 1; }; }
}

# A folder with one program, as the smallest image.
make_image() {
    local program
    program=$(type -P true)
    mkdir -p image/{dev,etc,proc,sys,tmp,bin,deepsquare} &&
        cp "$program" image/bin/true &&
        touch image/etc/{hosts,passwd,group,resolv.conf} &&
        ldd "$program" | grep -o '/[^ ]*' | while read -r library; do
            mkdir -p "image/${library%/*}" && cp "$library" "image/$library"
        done
}

podman_run() {
    local files processes
    files=$(ulimit -Hn) processes=$(ulimit -Hu)
    if [[ $files == unlimited ]]; then files=1048576; fi
    if [[ $processes == unlimited || $processes -gt 32768 ]]; then processes=32768; fi
    podman run --rm "--network=$1" --log-driver=none "--ulimit=nofile=$files:$files" \
        "--ulimit=nproc=$processes:$processes" --rootfs "$PWD/image:O" /bin/true
}
run_podman() { has podman && podman_run host; }
run_podman_network() { has podman && podman_run slirp4netns; }

# Runs a command in a network of its own, as a step: on Slurm on a node. Arguments: command.
in_network() {
    local launcher=()
    network_file resolv.conf "nameserver 169.254.254.3" && network_program || return
    if [[ -n ${SLURM_JOB_ID-} ]]; then launcher=(srun --ntasks=1); fi
    "${launcher[@]}" "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" "" "" "$@"
}
run_host_network() { can_nest && network_folder && in_network true; }
run_interfaces() {
    network_folder || return
    local runtime
    for runtime in "$@"; do
        if [[ -z $runtime ]]; then continue; fi
        if in_network "$BASH" -c "run_$runtime"; then return; fi
    done
    echo "there is no container runtime but Podman"
    return 1
}
make_wireguard() {
    has wg && network_folder && network_file wg0.wireguard "[Interface]" "PrivateKey = $(wg genkey)" &&
        network_file wg0.addresses 192.0.2.1/32 && network_file wg0.routes && in_network true
}
# A peer reaches the hub: it answers that a port is closed.
join_hub() {
    local answer
    HUBS=()
    trap stop_virtual_networks EXIT
    has wg socat && start_virtual_network 0 192.0.2.1/24 192.0.2.0/24 192.0.2.2 && network_folder &&
        join_virtual_network vnet0 0 0 192.0.2.2/24 192.0.2.0/24 || return
    answer=$(LC_ALL=C in_network timeout 20 "$BASH" -c '</dev/tcp/192.0.2.1/9' 2>&1) || :
    [[ $answer == *refused* ]] || { echo "the hub can't be reached: ${answer:-no answer}" && return 1; }
}
open_tunnel() { has python3 && python3 -c 'import paramiko'; }
run_charliecloud() {
    has ch-run ch-convert ch-image && can_nest && USER=${USER:-job} ch-run --write --bind "$PWD:/deepsquare" "$PWD/image" -- /bin/true
}
run_apptainer() { has apptainer && apptainer --silent exec --writable-tmpfs --no-home "$PWD/image" /bin/true; }
run_enroot() {
    has enroot mksquashfs && mksquashfs image image.sqsh -quiet -no-progress >/dev/null &&
        enroot create --force --name deepsquare-ability image.sqsh &&
        enroot start --rw deepsquare-ability /bin/true && enroot remove --force deepsquare-ability
}
find_hosted() { run_apptainer && { [[ -d /opt/software ]] || { echo "/opt/software is not there" && return 1; }; }; }
find_x11() { [[ -d /tmp/.X11-unix ]] || { echo "/tmp/.X11-unix is not there" && return 1; }; }
find_network() {
    if has curl && awk '$2 == "00000000" { found = 1 } END { exit !found }' /proc/net/route 2>/dev/null; then return 0; fi
    echo "there is no curl, or no route to other machines"
    return 1
}
find_s3() { find_network && has s5cmd && s5cmd version; }
map_users() { can_nest && unshare --user --map-user=1337 --map-group=1337 true; }
start_tasks() {
    if [[ -n ${SLURM_JOB_ID-} ]]; then has srun && srun --ntasks=1 true; else
        has mpirun && mpirun --allow-run-as-root --oversubscribe -n 2 true
    fi
}
find_mpi() {
    [[ -n ${SLURM_JOB_ID-} ]] || { echo "only on Slurm" && return 1; }
    if has srun && srun --mpi=list 2>&1 | grep -Fqw "$1"; then return 0; fi
    echo "Slurm has no $1"
    return 1
}

while read -r name; do export -f "${name?}"; done < <(compgen -A function)
export DEEPSQUARE_STATE=$PWD/.deepsquare
mkdir -p "$DEEPSQUARE_STATE"
make_image
runtimes=()
for runtime in podman charliecloud apptainer enroot; do
    if try "$runtime" "run_$runtime"; then runtimes+=("$runtime"); fi
done
if ((${#runtimes[@]})); then echo "ability container yes"; else echo "ability container no there is no container runtime"; fi
try hosted-images find_hosted
try internet find_network
try s3 find_s3
try tasks start_tasks
if try netns.host run_host_network; then
    if try netns.interfaces run_interfaces "${runtimes[@]#podman}"; then
        echo "ability netns yes"
    else
        try netns run_podman_network
    fi
    try wireguard make_wireguard
    try vnet join_hub
    try bore open_tunnel
else
    try netns run_podman_network
    for name in netns.interfaces wireguard vnet bore; do
        echo "ability $name no as netns.host: steps have no networks of their own"
    done
fi
try userns map_users
try x11 find_x11
try mpi.pmix_v4 find_mpi pmix_v4
try mpi.pmi2 find_mpi pmi2
rm -rf image image.sqsh "$DEEPSQUARE_STATE"
exit 0
