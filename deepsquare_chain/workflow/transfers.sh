
# -- data

# Runs a command up to five times, with growing pauses.
persist() {
    local pause
    for pause in 1 2 4 8; do
        if "$@"; then return 0; fi
        sleep "$pause"
    done
    "$@"
}

# Fetches an address, which stands in a file that curl reads: it may hold a password. An interrupted
# download is continued.
fetch_url() {
    curl --config "$1" --fail --silent --show-error --location --continue-at - --output "$2"
}

# Unpacks a file that is an archive into a folder and keeps it. Nothing leaves the folder: names that
# lead out of it and links that point out of it are refused.
unpack() {
    local file=$1 folder=$2 inside magic
    inside=$(mktemp -d "$folder/.unpack.XXXXXX") || return
    magic=$(head -c 6 "$file" | od -An -tx1 | tr -d ' \n')
    if tar -tf "$file" >/dev/null 2>&1; then
        check_names < <(tar -tf "$file") && tar -xf "$file" -C "$inside" --no-same-owner
    else
        case $magic in
        504b0304*) check_names < <(unzip -Z1 "$file") && unzip -q "$file" -d "$inside" ;;
        1f8b*) gzip -dc "$file" >"$inside/$(plain_name "$file" gz)" ;;
        425a68*) bzip2 -dc "$file" >"$inside/$(plain_name "$file" bz2)" ;;
        fd377a585a00) xz -dc "$file" >"$inside/$(plain_name "$file" xz)" ;;
        377abcaf271c | 526172211a07*) bsdtar -xf "$file" -C "$inside" ;;
        *) ;;
        esac
    fi || return
    check_links "$inside" || return
    cp -a "$inside/." "$folder/" && rm -rf "$inside"
}

# The name of a file without its ending; with one behind it where it had none.
plain_name() {
    local name=${1##*/}
    if [[ $name == *".$2" ]]; then echo "${name%".$2"}"; else echo "$name.out"; fi
}

check_names() {
    local name
    while IFS= read -r name; do
        case /$name/ in
        //* | */../*)
            echo "The archive holds a name that leads out of its folder; it is not unpacked." >&2
            return 1
            ;;
        esac
    done
}

check_links() {
    local link target
    while IFS= read -r -d '' link; do
        target=$(realpath -m -- "$link")
        if [[ $target != "$1"/* ]]; then
            echo "The archive holds a link that points out of its folder; it is not unpacked." >&2
            rm -rf "$1"
            return 1
        fi
    done < <(find "$1" -type l -print0)
}

# Copies a folder of a bucket, or one object, into a folder; what is there already is not copied again.
pull_bucket() {
    local url=$1 folder=$2 region=$3
    if s5cmd ls "${url%/}/*" >/dev/null 2>&1; then
        s5cmd --log error sync --source-region "$region" "${url%/}/*" "$folder/"
    else
        s5cmd --log error cp --source-region "$region" "$url" "$folder/"
    fi
}

# Copies a folder into a folder of a bucket.
push_bucket() {
    local folder=$1 url=$2 region=$3
    shift 3
    if [[ -z $(find "$folder" -mindepth 1 -print -quit) && $* != *--delete* ]]; then return 0; fi
    s5cmd --log error sync "$@" --destination-region "$region" "$folder/" "${url%/}/"
}

# Sends the one file of a folder, or all of them as output.zip, and prints what the server answers.
put_output() {
    local config=$1 folder=$2 file
    local files=()
    mapfile -d '' files < <(find "$folder" -type f -print0)
    case ${#files[@]} in
    0)
        echo "There is no output to send." >&2
        return 0
        ;;
    1) file=${files[0]} ;;
    *)
        file=$DEEPSQUARE_STATE/output.zip
        rm -f "$file"
        (cd "$folder" && zip -q -r -X "$file" .) || return
        ;;
    esac
    curl --config "$config" --fail --silent --show-error --location --upload-file "$file"
    local code=$?
    echo
    return "$code"
}
