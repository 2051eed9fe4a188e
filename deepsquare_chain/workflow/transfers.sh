
# -- data

# Runs a command up to five times, with increasing pauses.
retry() {
    local pause
    for pause in 1 2 4 8; do
        if "$@"; then return 0; fi
        sleep "$pause"
    done
    "$@"
}

# Downloads a URL, which curl reads from a file as it may contain a password. An interrupted download is continued.
download_url() {
    curl --config "$1" --fail --silent --show-error --location --continue-at - --output "$2"
}

# Extracts a file into a folder if it is an archive, and keeps it. Names and links that lead out of the folder are
# refused.
extract_archive() {
    local file=$1 folder=$2 content magic
    content=$(mktemp -d "$folder/.extracted.XXXXXX") || return
    magic=$(head -c 6 "$file" | od -An -tx1 | tr -d ' \n')
    if tar -tf "$file" >/dev/null 2>&1; then
        check_archive_names < <(tar -tf "$file") && tar -xf "$file" -C "$content" --no-same-owner
    else
        case $magic in
        504b0304*) check_archive_names < <(unzip -Z1 "$file") && unzip -q "$file" -d "$content" ;;
        1f8b*) gzip -dc "$file" >"$content/$(name_without_suffix "$file" gz)" ;;
        425a68*) bzip2 -dc "$file" >"$content/$(name_without_suffix "$file" bz2)" ;;
        fd377a585a00) xz -dc "$file" >"$content/$(name_without_suffix "$file" xz)" ;;
        377abcaf271c | 526172211a07*) bsdtar -xf "$file" -C "$content" ;;
        *) ;;
        esac
    fi || return
    check_archive_links "$content" || return
    cp -a "$content/." "$folder/" && rm -rf "$content"
}

# Prints the name of a file without a suffix, or with .out added if it does not have that suffix.
name_without_suffix() {
    local name=${1##*/}
    if [[ $name == *".$2" ]]; then echo "${name%".$2"}"; else echo "$name.out"; fi
}

check_archive_names() {
    local name
    while IFS= read -r name; do
        case /$name/ in
        //* | */../*)
            echo "The archive has a name that leads out of its folder; it is not extracted." >&2
            return 1
            ;;
        esac
    done
}

check_archive_links() {
    local link target
    while IFS= read -r -d '' link; do
        target=$(realpath -m -- "$link")
        if [[ $target != "$1"/* ]]; then
            echo "The archive has a link that points out of its folder; it is not extracted." >&2
            rm -rf "$1"
            return 1
        fi
    done < <(find "$1" -type l -print0)
}

# Downloads a folder of a bucket, or one object, into a folder; existing files are not copied again.
download_bucket() {
    local url=$1 folder=$2 region=$3
    if s5cmd ls "${url%/}/*" >/dev/null 2>&1; then
        s5cmd --log error sync --source-region "$region" "${url%/}/*" "$folder/"
    else
        s5cmd --log error cp --source-region "$region" "$url" "$folder/"
    fi
}

# Uploads a folder to a folder of a bucket.
upload_bucket() {
    local folder=$1 url=$2 region=$3
    shift 3
    if [[ -z $(find "$folder" -mindepth 1 -print -quit) && $* != *--delete* ]]; then return 0; fi
    s5cmd --log error sync "$@" --destination-region "$region" "$folder/" "${url%/}/"
}

# Uploads the only file of a folder, or all files as output.zip, and prints the server's response.
upload_output() {
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
