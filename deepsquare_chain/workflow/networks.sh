
# -- networks of steps

# The network of a step is a folder of files, which the job's shell writes and the step reads when it starts:
#   resolv.conf                  name servers
#   NAME.wireguard               an interface, as `wg setconf` reads it
#   NAME.addresses, NAME.routes  its addresses, and the networks behind its peers
#   N.bore                       a tunnel: host, port, port of the step, and secret or an empty line
#   bore.py                      the client of tunnels
#   hub                          the hub of a virtual network: its address in the network of the job
# Keys are in files only: other users of the machine can see arguments.

# Creates the folder of a network, DEEPSQUARE_NETWORK.
network_folder() {
    DEEPSQUARE_NETWORK=$DEEPSQUARE_STATE/network.$BASHPID.$RANDOM
    (umask 077 && mkdir -p "$DEEPSQUARE_NETWORK")
}

# Writes a file that only this user can read. Arguments: path, lines.
private_file() (
    umask 077
    file=$1
    shift
    if (($#)); then printf '%s\n' "$@"; fi >"$file"
)

# Writes a file of the network. Arguments: name, lines.
network_file() { private_file "$DEEPSQUARE_NETWORK/$1" "${@:2}"; }

# Writes the program that runs a command in the network; a step may start on another node. Its arguments: `main`,
# folder, user ID, group ID (the current ones if empty), command.
network_program() {
    # shellcheck disable=SC2016
    network_file program "$(declare -f network_main network_uplink network_hub network_inside network_services \
        network_wireguard network_failed)" 'network_"$@"'
}

network_failed() {
    echo "The network of a step can't be made: ${1:-unknown reason}" >&2
    exit 1
}

# Replaces this process by the command, in a network namespace of its own. The processes that serve the namespace
# end after the last process of the step, as their input then ends.
network_main() {
    local folder=$1 user=$2 group=$3 pipes program
    shift 3
    for program in ip slirp4netns unshare setsid; do
        PATH=$PATH:/usr/sbin:/sbin type -P "$program" >/dev/null || network_failed "$program is not installed"
    done
    if ! pipes=$(mktemp -d) || ! mkfifo "$pipes/started" "$pipes/ready"; then network_failed "no temporary folder"; fi
    # Opened for reading and writing, so that neither side waits for the other to open it.
    exec 6<>"$pipes/started" 7<>"$pipes/ready"
    rm -rf "$pipes"
    exec 9> >(setsid "$BASH" "$folder/program" uplink "$folder" "$$" <&0 >/dev/null 2>"$folder/log" &)
    wait "$!" 2>/dev/null
    exec unshare --user --map-root-user --net --mount -- \
        "$BASH" "$folder/program" inside "$folder" "${user:-$(id -u)}" "${group:-$(id -g)}" "$@"
}

# Connects the namespace of a process with the network of the job. Arguments: folder, process.
network_uplink() {
    local line options=(--configure --cidr=169.254.254.0/24 --exit-fd=0)
    PATH+=:/usr/sbin:/sbin
    cd "$1" || return
    until read -r -t 1 -u 6 line; do
        if [[ ! -d /proc/$2 ]]; then return; fi
    done
    exec 6>&-
    if [[ -e hub ]]; then
        # The length of a socket's path is limited; this one is relative.
        slirp4netns "${options[@]}" --api-socket=api "$2" tap0 <&0 7>&- &
        if network_hub "$!"; then printf 1 >&7; else printf 0 >&7; fi
        exec 7>&-
        wait
    else
        slirp4netns "${options[@]}" --ready-fd=7 "$2" tap0 || printf 0 >&7
    fi
}

# Lets the namespace receive the packets of a UDP port, whose number it writes to the file `port`.
# Argument: the process of slirp4netns.
network_hub() {
    local port call response
    while kill -0 "$1"; do
        port=$((20000 + RANDOM % 40000))
        call='{"execute":"add_hostfwd","arguments":{"proto":"udp","host_addr":"'$(<hub)'","host_port":'$port',"guest_port":51820}}'
        response=$(socat -t 10 - UNIX-CONNECT:api <<<"$call")
        if [[ $response == *'"return"'* ]]; then
            echo "$port" >port.new && mv port.new port
            return
        fi
        sleep 0.2
    done
    return 1
}

# Makes the interfaces as root of the namespace, then becomes the command, as the given user.
# Arguments: folder, user ID, group ID, command.
network_inside() {
    local folder=$1 user=$2 group=$3 status="" path=$PATH
    shift 3
    PATH+=:/usr/sbin:/sbin
    echo >&6
    read -r -n 1 -t 60 -u 7 status
    if [[ $status != 1 ]]; then network_failed "slirp4netns: $(tail -n 1 "$folder/log")"; fi
    ip link set lo up || network_failed "no loopback interface"
    mount --bind "$folder/resolv.conf" /etc/resolv.conf || network_failed "/etc/resolv.conf can't be replaced"
    if [[ -e $folder/hub ]]; then
        # Not every kernel has IPv6.
        (echo 1 >/proc/sys/net/ipv6/conf/all/forwarding) 2>/dev/null
        (echo 1 >/proc/sys/net/ipv4/ip_forward) 2>/dev/null || network_failed "packets can't be forwarded"
    fi
    if compgen -G "$folder/*.wireguard" >/dev/null || compgen -G "$folder/*.bore" >/dev/null; then
        exec 8> >(setsid unshare --mount -- "$BASH" "$folder/program" services "$folder" \
            <&0 2>"$folder/log.services" 6>&- 9>&- &)
        wait "$!" 2>/dev/null
        read -r -n 1 -t 60 -u 7 status
        if [[ $status != 1 ]]; then network_failed "$(tail -n 1 "$folder/log.services")"; fi
    fi
    exec 6>&- 7>&-
    PATH=$path
    if [[ $user == 0 && $group == 0 ]]; then exec "$@"; fi
    exec unshare --user --map-user="$user" --map-group="$group" -- "$@"
}

# Serves the interfaces until its input ends, in file systems of its own. Argument: folder.
network_services() {
    local file line pids=()
    cd "$1" || return
    for file in *.wireguard; do
        if [[ -e $file ]] && ! network_wireguard "${file%.wireguard}"; then
            printf 0 >&7
            return
        fi
    done
    for file in *.bore; do
        if [[ -e $file ]]; then
            python3 bore.py <"$file" 2>&1 7>&- &
            pids+=("$!")
        fi
    done
    printf 1 >&7
    exec 7>&- >/dev/null
    while read -r line; do :; done
    if ((${#pids[@]})); then kill "${pids[@]}"; fi
}

# Makes a WireGuard interface: of the kernel, else one served by a process, which is added to `pids`.
# Argument: name of the interface.
network_wireguard() {
    local name=$1 line endpoint
    if ! ip link add "$name" type wireguard 2>/dev/null; then
        if ! command -v wireguard-go; then
            echo "the kernel has no WireGuard, and wireguard-go is not installed" >&2
            return 1
        fi >/dev/null
        # `wg` looks for the socket of the process in this folder.
        if ! mountpoint -q /var/run/wireguard; then
            mount -t tmpfs none /var && mkdir -p /var/run/wireguard && mount --bind /var/run/wireguard{,} || return
        fi
        wireguard-go -f "$name" </dev/null >&2 7>&- &
        pids+=("$!")
        until [[ -S /var/run/wireguard/$name.sock ]]; do
            kill -0 "$!" || return
            sleep 0.05
        done
    fi
    wg setconf "$name" "$name.wireguard" || return
    while read -r line; do ip address add "$line" dev "$name" || return; done <"$name.addresses"
    ip link set "$name" up || return
    # Packets to a peer itself do not pass through the interface.
    while read -r _ endpoint; do
        endpoint=${endpoint%:*}
        if [[ $(ip route get "$endpoint" 2>/dev/null) == *" via "*" dev tap0 "* ]]; then
            ip route replace "$endpoint" via 169.254.254.2 dev tap0 || return
        fi
    done < <(wg show "$name" endpoints)
    while read -r line; do ip route replace "$line" dev "$name" || return; done <"$name.routes"
}

# -- virtual networks

# Starts the hub of a virtual network, and makes a key for each peer.
# Arguments: number of the network, address of the hub, range of the network, addresses of the peers.
start_virtual_network() {
    local number=$1 gateway=$2 range=$3 address key public peer hub keys=()
    local endpoint=169.254.254.2 listen=127.0.0.1
    shift 3
    network_folder || return
    if ((${SLURM_JOB_NUM_NODES:-1} > 1)); then
        listen=0.0.0.0
        endpoint=$(hostname -I) && endpoint=${endpoint%% *}
    fi
    key=$(wg genkey) || return
    hub=("[Interface]" "PrivateKey = $key" "ListenPort = 51820")
    public=$(wg pubkey <<<"$key") || return
    for address; do
        key=$(wg genkey) || return
        keys+=("$key")
        hub+=("[Peer]" "PublicKey = $(wg pubkey <<<"$key")" "AllowedIPs = $address")
    done
    network_file resolv.conf && network_file hub "$listen" && network_file vnet.wireguard "${hub[@]}" &&
        network_file vnet.addresses "$gateway" && network_file vnet.routes && network_program || return
    # shellcheck disable=SC2016
    "$BASH" "$DEEPSQUARE_NETWORK/program" main "$DEEPSQUARE_NETWORK" "" "" "$BASH" -c ': >"$1" && exec sleep infinity' \
        hub "$DEEPSQUARE_NETWORK/up" &
    HUBS+=("$!")
    until [[ -e $DEEPSQUARE_NETWORK/up ]]; do
        kill -0 "$!" 2>/dev/null || return
        sleep 0.1
    done
    for peer in "${!keys[@]}"; do
        private_file "$DEEPSQUARE_STATE/vnet.$number.$peer" "[Interface]" "PrivateKey = ${keys[peer]}" \
            "[Peer]" "PublicKey = $public" "AllowedIPs = $range" "PersistentKeepalive = 20" \
            "Endpoint = $endpoint:$(<"$DEEPSQUARE_NETWORK/port")" || return
    done
}

stop_virtual_networks() {
    if ((${#HUBS[@]})); then
        kill "${HUBS[@]}" || :
        wait "${HUBS[@]}" || :
    fi 2>/dev/null
}

# Adds an interface in a virtual network. Arguments: its name, number of the network, number of the peer, address,
# range of the network.
join_virtual_network() {
    (umask 077 && cp "$DEEPSQUARE_STATE/vnet.$2.$3" "$DEEPSQUARE_NETWORK/$1.wireguard") &&
        network_file "$1.addresses" "$4" && network_file "$1.routes" "$5"
}
