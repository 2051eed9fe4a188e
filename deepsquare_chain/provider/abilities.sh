# shellcheck shell=bash disable=SC2329
# Prints what jobs can do where this runs: one line "ability NAME yes" or "ability NAME no REASON" each.
# It is run as a job is run, so that what it finds is what jobs find.

try() {
    local name=$1 said
    shift
    if said=$(timeout 60 bash -c 'set -e; "$@"' try "$@" 2>&1 </dev/null); then
        echo "ability $name yes"
    else
        said=$(tail -n 1 <<<"$said" | tr -c '[:print:]' ' ')
        echo "ability $name no ${said:-it fails without a word}"
        return 1
    fi
}

has() {
    local program
    for program; do
        command -v "$program" >/dev/null || { echo "$program is not installed" && return 1; }
    done
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
run_netns() { has podman && podman_run slirp4netns; }
run_charliecloud() {
    has ch-run ch-convert ch-image && USER=${USER:-job} ch-run --write --bind "$PWD:/deepsquare" "$PWD/image" -- /bin/true
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
map_users() { has unshare && unshare --user --map-user=1337 --map-group=1337 true; }
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
make_image
runtimes=0
for runtime in podman charliecloud apptainer enroot; do
    if try "$runtime" "run_$runtime"; then runtimes=1; fi
done
if ((runtimes)); then echo "ability container yes"; else echo "ability container no there is no container runtime"; fi
try hosted-images find_hosted
try internet find_network
try s3 find_s3
try tasks start_tasks
try netns run_netns
try userns map_users
try x11 find_x11
try mpi.pmix_v4 find_mpi pmix_v4
try mpi.pmi2 find_mpi pmi2
rm -rf image image.sqsh
exit 0
