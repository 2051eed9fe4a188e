
# -- containers

# Prints the names of all variables that are passed to a container.
container_variables() {
    local name
    for name in "${DEEPSQUARE_CONTAINER_ENV[@]}"; do
        if [[ -n ${!name+x} ]]; then echo "$name"; fi
    done | sort -u
}

# Sets the variables of the job's folders to their paths in a container.
set_container_folders() {
    DEEPSQUARE_HOST_SHARED=$DEEPSQUARE_SHARED_TMP DEEPSQUARE_HOST_WORLD=$DEEPSQUARE_SHARED_WORLD_TMP
    DEEPSQUARE_HOST_DISK=$DEEPSQUARE_DISK_TMP DEEPSQUARE_HOST_DISK_WORLD=$DEEPSQUARE_DISK_WORLD_TMP
    # Mount points in the folder of the job.
    mkdir -p "$DEEPSQUARE_STORAGE"/{tmp,world-tmp,disk/tmp,disk/world-tmp} || return
    export STORAGE_PATH=/deepsquare
    export DEEPSQUARE_INPUT=/deepsquare/input DEEPSQUARE_OUTPUT=/deepsquare/output
    export DEEPSQUARE_ENV=/deepsquare/${DEEPSQUARE_ENV##*/}
    export DEEPSQUARE_TMP=/deepsquare/tmp DEEPSQUARE_SHARED_TMP=/deepsquare/tmp
    export DEEPSQUARE_SHARED_WORLD_TMP=/deepsquare/world-tmp
    export DEEPSQUARE_DISK_TMP=/deepsquare/disk/tmp DEEPSQUARE_DISK_WORLD_TMP=/deepsquare/disk/world-tmp
}

# Sets the login of a registry for one container runtime only: others might pass it on to the container.
# Arguments: runtime, registry, login as user:password.
registry_login() {
    local folder=$DEEPSQUARE_STATE/login user=${3%%:*} password=${3#*:} token
    mkdir -p "$folder" || return
    case $1 in
    podman)
        token=$(printf '%s' "$3" | base64 -w 0)
        (umask 077 && printf '{"auths":{"%s":{"auth":"%s"}}}\n' "$2" "$token" >"$folder/config.json") || return
        export REGISTRY_AUTH_FILE=$folder/config.json
        ;;
    charliecloud) DEEPSQUARE_REGISTRY_USER=$user DEEPSQUARE_REGISTRY_PASSWORD=$password ;;
    apptainer) export APPTAINER_DOCKER_USERNAME=$user APPTAINER_DOCKER_PASSWORD=$password ;;
    enroot)
        (umask 077 && printf 'machine %s login %s password %s\n' "$2" "$user" "$password" >"$folder/.credentials") || return
        export ENROOT_CONFIG_PATH=$folder
        ;;
    esac
}

# Prints options with the current limits: Podman's default limits need the privilege to raise them.
podman_limits() {
    local files processes
    files=$(ulimit -Hn) processes=$(ulimit -Hu)
    if [[ $files == unlimited ]]; then files=1048576; fi
    if [[ $processes == unlimited || $processes -gt 32768 ]]; then processes=32768; fi
    printf '%s\n' "--ulimit=nofile=$files:$files" "--ulimit=nproc=$processes:$processes"
}

# Adds the image to the options: an image of a registry, a folder, or an archive of an image.
podman_image() {
    if [[ $1 == registry ]]; then
        DEEPSQUARE_OPTIONS+=("$2")
    elif [[ -d $2 ]]; then
        DEEPSQUARE_OPTIONS+=(--rootfs "$2:O")
    else
        DEEPSQUARE_OPTIONS+=("docker-archive:$2")
    fi
}

# Sets DEEPSQUARE_IMAGE to the folder of an image, which is fetched once per job.
charliecloud_image() {
    export USER=${USER:-job}
    DEEPSQUARE_OPTIONS=() DEEPSQUARE_IMAGE=$2
    if [[ $1 == file && -d $2 ]]; then mkdir -p "$2/deepsquare"; else charliecloud_fetch "$@"; fi || return
    if [[ -f $DEEPSQUARE_IMAGE/ch/environment ]]; then DEEPSQUARE_OPTIONS=(--set-env); fi
}

charliecloud_fetch() {
    DEEPSQUARE_IMAGE=$DEEPSQUARE_STATE/images/$(printf '%s' "$2" | sha256sum | cut -c 1-32)
    mkdir -p "$DEEPSQUARE_STATE/images" || return
    # The tools' output is shown only after a failure.
    if ! charliecloud_create "$@" >"$DEEPSQUARE_IMAGE.log" 2>&1; then
        cat "$DEEPSQUARE_IMAGE.log" >&2
        return 1
    fi
}

charliecloud_create() {
    (
        exec 9>"$DEEPSQUARE_IMAGE.lock"
        flock 9
        if [[ -e $DEEPSQUARE_IMAGE ]]; then exit 0; fi
        export CH_IMAGE_STORAGE=$DEEPSQUARE_STATE/ch-image
        case $1 in
        registry)
            local options=()
            if [[ -n ${DEEPSQUARE_REGISTRY_USER-} ]]; then
                options=(--auth)
                export CH_IMAGE_USERNAME=$DEEPSQUARE_REGISTRY_USER CH_IMAGE_PASSWORD=$DEEPSQUARE_REGISTRY_PASSWORD
            fi
            ch-image --no-cache "${options[@]}" pull "$2" &&
                ch-convert -i ch-image -o dir "$2" "$DEEPSQUARE_IMAGE.new"
            ;;
        *) ch-convert -i tar -o dir "$2" "$DEEPSQUARE_IMAGE.new" ;;
        esac && mkdir -p "$DEEPSQUARE_IMAGE.new/deepsquare" && mv "$DEEPSQUARE_IMAGE.new" "$DEEPSQUARE_IMAGE"
    )
}

# Sets DEEPSQUARE_IMAGE to the name of a container made of an image, once per job. It is removed with the job.
enroot_image() {
    local file=$2
    export ENROOT_DATA_PATH=$DEEPSQUARE_STATE/enroot
    mkdir -p "$ENROOT_DATA_PATH" || return
    DEEPSQUARE_IMAGE=deepsquare-${DEEPSQUARE_JOB_ID:-0}-$(printf '%s' "$2" | sha256sum | cut -c 1-16)
    (
        exec 9>"$DEEPSQUARE_STATE/$DEEPSQUARE_IMAGE.lock"
        flock 9
        if enroot list | grep -Fxq "$DEEPSQUARE_IMAGE"; then exit 0; fi
        if [[ $1 == registry ]]; then
            file=$DEEPSQUARE_STATE/$DEEPSQUARE_IMAGE.sqsh
            enroot import --output "$file" "$2" >&2 || exit
        fi
        enroot create --name "$DEEPSQUARE_IMAGE" "$file" >&2
    )
}

# Sets DEEPSQUARE_STARTUP to a file with lines that the container runs before its command.
enroot_startup() {
    DEEPSQUARE_STARTUP=$DEEPSQUARE_STATE/enroot.$BASHPID.rc
    printf '%s\n' "$1" >"$DEEPSQUARE_STARTUP"
}
