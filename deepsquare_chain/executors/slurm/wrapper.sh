#!/bin/bash
# Runs one job inside its Slurm allocation: `wrapper.sh RUN_FOLDER`; or one task of a step of a job in the
# sandbox: `wrapper.sh RUN_FOLDER STEP PROGRAM ...`.
#
# sbatch reads this file, which executes the customer's script: sbatch directives in that script have no
# effect. The nodes need bash 4.2, coreutils and util-linux's setsid, and share the run folder with the daemon.
#
#   start.json     written first, and only once: a second Slurm job of this run ends at once
#   control.json   read about once per second: walltime in seconds, and cancel request
#   output, output.POSITION    output of the job, limited by rotation
#   sandbox, limits    with isolation: bubblewrap's command, and limits of disk (KB), processes, GPUs,
#                      and whether jobs may create user namespaces
#   srun, steps/   the `srun` of a job in the sandbox; its pipes, and the environment of each step
#   end.json       exit code, reason and duration; written after the end of the job's processes

folder=$1
umask 077
# The daemon runs as another user, which reads the records by the group of the folder.
if [[ ! -O $folder ]]; then umask 007; fi
readonly TAKEN=75 GRACE=200        # GRACE between TERM and KILL, in hundredths of a second
readonly HEAD=524288 SEGMENT=131072 SEGMENTS=3
readonly JOB=${SLURM_JOB_ID:?this runs inside a Slurm job}
# Marks all processes of the script, by their environment.
read -r MARK </proc/sys/kernel/random/uuid
readonly MARK

cd "$folder/work" || exit 78
unbuffered=()
if command -v stdbuf >/dev/null; then unbuffered=(stdbuf -o0); fi

script=$folder/script home=$folder/work
sandbox=() remount=() disk=0 processes=0 gpus=0 namespaces=0 init=""
if [[ -e $folder/sandbox ]]; then
    while IFS= read -r -d '' entry; do sandbox+=("$entry"); done <"$folder/sandbox"
    read -r disk processes gpus namespaces <"$folder/limits"
    remount=("${sandbox[@]: -2}") # makes the root read-only, after all other mounts
    sandbox=("${sandbox[@]:0:${#sandbox[@]}-2}")
    if ((gpus)); then
        sandbox+=(--ro-bind /sys /sys)
        # Slurm's cgroup only permits the devices of this job.
        for device in /dev/nvidia* /dev/dri /dev/kfd; do
            if [[ -e $device ]]; then sandbox+=(--dev-bind "$device" "$device"); fi
        done
    fi
    if ((!namespaces)) && bwrap --help 2>&1 | grep -q -e --disable-userns; then sandbox+=(--disable-userns); fi
    script=/run/job/script home=/home/job
fi

# Finds the init process of the sandbox: all others end with it.
find_init() {
    if [[ -z $init && ${#sandbox[@]} -gt 0 ]]; then
        read -r init _ <"/proc/$pid/task/$pid/children"
    fi 2>/dev/null
}

# Returns whether the init process is alive; its pid may have been reused by another process.
has_init() { [[ -n $init && -e /proc/$init && ! /proc/$init/ns/pid -ef /proc/self/ns/pid ]]; }

# Returns whether the sandbox has more processes and threads than the provider allows.
exceeds_process_limit() {
    local threads
    find_init
    # During its set-up, the sandbox still has the root of the node.
    ((processes)) && has_init && [[ ! /proc/$init/root/proc -ef /proc ]] || return
    threads=(/proc/"$init"/root/proc/[0-9]*/task/[0-9]*)
    ((${#threads[@]} > processes + 1))
}

# Waits for a child to end, and sets `code` to its exit code.
wait_for() {
    while :; do
        wait "$1"
        code=$?
        # The wait may have been interrupted by a signal to this shell.
        kill -0 "$1" 2>/dev/null || break
    done
}

# -- a task of a step

# Creates and locks the folder that is /dev/shm of this job's tasks on this node. The lock is shared and ends
# with the process: a process that gets it exclusively can safely remove the folder.
join_memory() {
    local other attempt
    for other in "/dev/shm/deepsquare-$UID-"*; do
        if [[ -d $other && ! -L $other && -O $other ]]; then leave_memory "$other"; fi
    done
    # Several clusters on one machine may use the same job IDs.
    read -r other _ < <(cksum <<<"$folder")
    memory=/dev/shm/deepsquare-$UID-$JOB-$other
    # Until the folder is locked, another task may find it unused and remove it.
    for ((attempt = 0; attempt < 100; attempt++)); do
        mkdir -m 0700 "$memory"
        if [[ -d $memory && ! -L $memory && -O $memory ]] && exec 8<"$memory"; then
            flock --shared 8
            if [[ /proc/self/fd/8 -ef $memory ]]; then return; fi
        fi
    done
    memory=""  # each task gets its own /dev/shm
} 2>/dev/null

# Removes such a folder if no task uses it.
leave_memory() {
    exec 7<"$1" || return
    # A task may have removed and recreated it since it was opened.
    if flock --nonblock 7 && [[ /proc/self/fd/7 -ef $1 ]]; then rm -rf "$1"; fi
    exec 7<&-
} 2>/dev/null

# Runs inside the sandbox: restores the caller's environment, except the variables that Slurm sets per task.
readonly ENTER='
    while IFS= read -r -d "" entry; do
        case $entry in
        SLURM* | PMI* | CUDA_VISIBLE_DEVICES=* | ROCR_VISIBLE_DEVICES=* | GPU_DEVICE_ORDINAL=* | GRID_RUN=*) ;;
        *) export "$entry" ;;
        esac
    done </run/job/environment 2>/dev/null
    # The shared memory transport of Open MPI fails if each task has its own namespaces; "sm" is its later name.
    export OMPI_MCA_btl=${OMPI_MCA_btl-^vader,sm}
    # So does the job data of PMIx in shared memory: tasks sometimes crashed at their start.
    export PMIX_MCA_gds=${PMIX_MCA_gds-hash}
    cd -- "$1" 2>/dev/null
    shift
    exec "$@"
'

run_task() {
    local step=$1 memory="" pid code directory watch=""
    shift
    join_memory
    # Bubblewrap ends with this task, as the step does.
    local inside=("${sandbox[@]}" --die-with-parent --ro-bind "$folder/steps/$step.env" /run/job/environment)
    if [[ -n $memory ]]; then inside+=(--bind "$memory" /dev/shm); fi
    directory=${PMIX_SERVER_TMPDIR-}
    if [[ -n $directory ]]; then inside+=(--bind "$directory" "$directory"); fi
    sandbox=("${inside[@]}")
    "${sandbox[@]}" "${remount[@]}" /bin/bash -c "$ENTER" task "$@" <&0 7<&- 8<&- &
    pid=$!
    trap : TERM HUP INT
    if ((processes)); then
        while sleep 1; do
            if exceeds_process_limit; then
                : >"$folder/steps/processes"
                kill -KILL "$init"
            fi
        done <&- >&- 2>&- 8<&- &
        watch=$!
    fi
    wait_for "$pid"
    if [[ -n $watch ]]; then kill "$watch"; fi
    exec 8<&-
    if [[ -n $memory ]]; then leave_memory "$memory"; fi
    exit "$code"
}

if (($# > 1)); then
    run_task "${@:2}"
fi

# -- the job

if ((${#sandbox[@]})); then
    # On a node without sandbox support no customer code runs, and nothing is written.
    if ! "${sandbox[@]}" "${remount[@]}" /bin/bash -c 'exit 0' </dev/null; then
        echo "This node can't run jobs in the sandbox: install bubblewrap, allow user namespaces." >&2
        exit 78
    fi
fi

# Sets `now` to hundredths of a second since boot, independent of changes of the wall clock.
clock() { local up; read -r up _ </proc/uptime; now=$((10#${up/./})); }

# A hard link is atomic, and fails if start.json exists.
printf '{"job":"%s","node":"%s","at":%s,"boot":"%s"}\n' "$JOB" "${SLURMD_NODENAME-}" \
    "$(date +%s.%N)" "$(cat /proc/sys/kernel/random/boot_id)" >"$folder/.start.$JOB" || exit 78
ln "$folder/.start.$JOB" "$folder/start.json" 2>/dev/null
# A network file system may report failure for a link that it created.
if ! cmp -s "$folder/.start.$JOB" "$folder/start.json"; then
    rm -f "$folder/.start.$JOB"
    exit "$TAKEN"
fi
rm -f "$folder/.start.$JOB"
started_at=$(date +%s.%N)
clock
started=$now
# Reserve the blocks of the end record, so that it can be written on a full disk.
printf '%512s' '' >"$folder/.end"

terminated=0
trap 'terminated=1' TERM
# A handler, not '': the script would inherit ignored signals.
trap : HUP INT XCPU USR1 USR2

# Writes the beginning of the job's output to `output`, and keeps the last segments of the rest.
write_output() {
    trap '' TERM
    cd "$folder" || exit
    "${unbuffered[@]}" head -c "$HEAD" >output
    local position=$HEAD size kept=()
    while :; do
        "${unbuffered[@]}" head -c "$SEGMENT" >"output.$position" 2>/dev/null
        size=$(stat -c %s "output.$position" 2>/dev/null || echo 0)
        if ((size == 0)); then
            rm -f "output.$position"
            # The end, or a full disk: discard the rest, so that the job can continue.
            cat >/dev/null
            return
        fi
        kept+=("$position")
        position=$((position + size))
        if ((${#kept[@]} > SEGMENTS)); then
            rm -f "output.${kept[0]}"
            kept=("${kept[@]:1}")
        fi
    done
}

# Prints the pid of the customer's shell, and its exit code after its end.
run_script() {
    trap : TERM
    # Otherwise Slurm applies --export=NONE to every srun of the job.
    unset SLURM_EXPORT_ENV
    export HOME=$home LANG=C.UTF-8
    while IFS= read -r -d '' entry; do export "${entry?}"; done <"$folder/environment"
    export GRID_RUN=$MARK
    exec 4>&1 1>&3 2>&3
    # Limit of a single file in KB; the total disk usage is measured.
    if ((disk)); then ulimit -f $((disk > 16384 ? disk : 16384)); fi
    if ((${#sandbox[@]})); then export PATH=/run/job/bin:$PATH; fi
    setsid "${sandbox[@]}" "${remount[@]}" /bin/bash "$script" </dev/null 3>&- 4>&- 5<&- &
    local pid=$! code
    echo "$pid" >&4
    wait_for "$pid"
    echo "$code" >&4
}

# -- the steps of a job in the sandbox

# Allowlist of srun options that stay inside the allocation and use no file, and whether they take a value.
declare -A TAKES
for name in ntasks nodes cpus-per-task ntasks-per-node ntasks-per-core ntasks-per-socket ntasks-per-gpu nodelist \
    exclude distribution mem mem-per-cpu mem-per-gpu gpus gpus-per-task gpus-per-node gpus-per-socket gres cpu-bind \
    mem-bind gpu-bind hint time wait relative job-name mpi threads-per-core chdir export; do
    TAKES[$name]=value
done
for name in label unbuffered exclusive exact overlap oversubscribe no-kill quiet verbose spread-job \
    use-min-nodes whole contiguous kill-on-bad-exit; do
    TAKES[$name]=nothing
done
readonly TAKES
readonly -A SHORT=([n]=ntasks [N]=nodes [c]=cpus-per-task [w]=nodelist [x]=exclude [m]=distribution [t]=time
    [W]=wait [r]=relative [J]=job-name [G]=gpus [D]=chdir [l]=label [u]=unbuffered [k]=no-kill [Q]=quiet
    [v]=verbose [s]=oversubscribe [K]=kill-on-bad-exit)

# Splits a call into srun options and program; refuses other options with a message on stderr.
read_options() {
    local word name value has_value
    options=() program=()
    while (($#)); do
        word=$1
        shift
        case $word in
        --) program=("$@") && return ;;
        --*)
            name=${word#--} value="" has_value=0
            if [[ $name == *=* ]]; then value=${name#*=} has_value=1; fi
            name=${name%%=*} word=--$name
            ;;
        -?*)
            name=${SHORT[${word:1:1}]-} value=${word:2} word=${word:0:2} has_value=0
            if [[ -n $value && ${name:+${TAKES[$name]}} == nothing && $value != [01=]* ]]; then
                set -- "-$value" "$@" # options without a value may be combined, as in -lu
            elif [[ -n $value ]]; then
                has_value=1
            fi
            ;;
        *) program=("$word" "$@") && return ;;
        esac
        if [[ -n $name && ${TAKES[$name]-} == value && $has_value == 0 && $# -gt 0 ]]; then
            value=$1 has_value=1
            shift
        fi
        # A value without a slash can't name a file that srun would read.
        case "${name:+${TAKES[$name]-}} $name $has_value $value" in
        "nothing "*" 0 "*) options+=("--$name") ;;
        "nothing kill-on-bad-exit 1 "[01]) options+=("--$name=$value") ;;
        "value chdir 1 "*) directory=$value ;;
        "value export 1 ALL") ;;
        "value export "*) refuse_option "$word" && return 1 ;;
        "value "*" 1 "*[!A-Za-z0-9_,.:=@+*\;\[\]\ -]*) refuse_option "$word" && return 1 ;;
        "value "*" 1 "?*) options+=("--$name=$value") ;;
        *) refuse_option "$word" && return 1 ;;
        esac
    done
}

has_program() {
    [[ ${#program[@]} -gt 0 || " ${options[*]} " == *" --mpi=list "* ]] || ! echo "srun: no program is given" >&2
}

refuse_option() { echo "srun: a job in the sandbox can't use the option $1 with this value" >&2; }

# Steps of a job at a time, and characters of a call's environment: its file is not part of the disk quota.
readonly MAX_STEPS=16 MAX_ENVIRONMENT=1000000

# Reads a call into `words` and `directory`, and its environment into a file. Descriptor 7 stays open.
read_call() {
    local count entry size=0
    # A pipe that is also open for writing can be opened even if the caller has ended.
    exec 8<>"$pipes.call" 7<"$pipes.call"
    IFS= read -r -d '' -t 60 -u 8 count && [[ $count =~ ^[0-9]{1,5}$ ]] || return
    exec 8<&-
    while ((count--)) && IFS= read -r -d '' -u 7 entry; do words+=("$entry"); done
    IFS= read -r -d '' -u 7 directory
    while IFS= read -r -d '' -u 7 entry && [[ -n $entry ]]; do
        (((size += ${#entry}) <= MAX_ENVIRONMENT)) || return
        printf '%s\0' "$entry"
    done >"$folder/steps/$step.env"
}

# Runs the step of one call; ends it when its caller has ended, which closes the pipe of descriptor 7.
run_step() {
    local pipes=$folder/steps/$1 step=$2 own=$BASHPID step_pid="" ended=0 code=2
    local words=() directory="" options program watcher
    trap 'rm -f "$pipes".* "$folder/steps/$step.env"' EXIT
    read_call || exit
    # TERM also ends this process while it waits for the caller to open another pipe.
    { IFS= read -r -d '' -u 7; kill -TERM "$own"; } <&- >&- 2>&- &
    watcher=$!
    exec 7<&-
    {
        if read_options "${words[@]}" && has_program; then
            trap 'ended=1; kill -TERM "$step_pid" 2>/dev/null' TERM
            srun "${options[@]}" /bin/bash "$folder/steps/wrapper" "$folder" "$step" "$directory" \
                "${program[@]}" <&0 &
            step_pid=$!
            if ((ended)); then kill -TERM "$step_pid"; fi
            wait_for "$step_pid"
            trap - TERM
        fi
    } <"$pipes.in" >"$pipes.out" 2>"$pipes.err"
    if ((!ended)); then echo "$code" >"$pipes.code"; fi
    kill "$watcher" 2>/dev/null
}

# Serves calls of srun, in its own process group, so that it is killed as a whole.
serve_steps() {
    local call pid step=0 running=() live
    trap - TERM HUP INT XCPU USR1 USR2
    export GRID_RUN=$MARK
    unset SLURM_EXPORT_ENV
    while IFS= read -r -n 64 -u 6 call; do
        [[ $call =~ ^[0-9a-f-]{36}$ && ! -e $folder/steps/$call.call ]] || continue
        # The processes of a step are outside of the sandbox, where the job's limit does not count them.
        while :; do
            live=()
            for pid in "${running[@]}"; do
                if kill -0 "$pid" 2>/dev/null; then live+=("$pid"); fi
            done
            if ((${#live[@]} < MAX_STEPS)); then break; fi
            sleep 0.1
        done
        # The nodes execute this file for each task; Slurm's own copy exists only on the first node.
        if ((step++ == 0)); then cp "${BASH_SOURCE[0]}" "$folder/steps/wrapper"; fi
        mkfifo "$folder/steps/$call".{call,in,out,err,code}
        run_step "$call" "$step" &
        running=("${live[@]}" "$!")
    done 6<>"$folder/steps/calls"
}

server=""
if ((${#sandbox[@]})) && [[ -e $folder/srun ]]; then
    mkdir "$folder/steps"
    mkfifo "$folder/steps/calls"
    sandbox+=(--ro-bind "$folder/srun" /run/job/bin/srun --ro-bind "$folder/steps" /run/job/steps)
    set -m
    serve_steps </dev/null &
    server=$!
    disown "$server"
    set +m
fi

exec 3> >(write_output)
writer=$!
exec 5< <(run_script)
exec 3>&-
read -r pid <&5
code=""

# Waits for the script's end, with a timeout in hundredths of a second.
wait_for_end() {
    local seconds
    printf -v seconds '%d.%02d' $(($1 / 100)) $(($1 % 100))
    [[ -z $code ]] && read -r -t "$seconds" code <&5
}

read_control() {
    local record
    record=$(<"$folder/control.json") 2>/dev/null || return
    [[ $record =~ \"walltime\":([0-9]{1,10})[,}] ]] && walltime=$((10#${BASH_REMATCH[1]} * 100))
    [[ $record =~ \"cancel\":true ]] && reason=cancelled
}

# Signals every process of the job, except bubblewrap's outer process: it would end at once, and the
# script's exit code would be lost.
signal_script() {
    local other
    find_init
    if has_init; then
        for other in /proc/[0-9]*; do
            if [[ $other/ns/pid -ef /proc/$init/ns/pid ]]; then kill "-$1" "${other#/proc/}"; fi
        done
    else
        kill "-$1" -- "-$pid"
    fi 2>/dev/null
}

# Prints the size in KB of deleted files that the job has open or mapped. Only root may read the size of a file
# that is mapped but not open: its mapped part counts, and only in folders that the job can fill.
deleted_files() {
    local links device inode blocks total=0 own range offset end
    local -A sizes=()
    own=$(stat -c %d "$folder/work")
    if has_init; then
        while read -r range _ offset _ inode _; do
            end=$((16#$offset + 16#${range#*-} - 16#${range%-*}))
            if ((end / 1024 > ${sizes[$inode]:-255})); then sizes[$inode]=$((end / 1024)); fi
        done < <(grep -hE ' (/home/job|/tmp|/var/tmp)/.* \(deleted\)$' /proc/"$init"/root/proc/[0-9]*/maps 2>/dev/null)
        while read -r links device inode blocks; do
            if ((links == 0 && device == own && inode)); then sizes[$inode]=$((blocks / 2)); fi
        done < <(stat -L -c '%h %d %i %b' /proc/"$init"/root/proc/[0-9]*/fd/* 2>/dev/null | sort -u)
    fi
    for blocks in "${sizes[@]}"; do total=$((total + blocks)); done
    echo "$total"
}

# Prints the size in KB of the job's files, of which each counts at least 1 KB for its inode.
files_on_disk() {
    local folders=("$folder/work" "$folder/tmp") used inodes
    if ! used=$(du -skc "${folders[@]}"); then
        # The job may have removed its owner's permissions on folders.
        find "${folders[@]}" -type d ! -perm -u=rwx -execdir chmod u+rwx {} \;
        used=$(du -skc "${folders[@]}")
    fi
    inodes=$(du -sc --inodes "${folders[@]}")
    used=${used##*$'\n'} inodes=${inodes##*$'\n'}
    echo $((${used%%[!0-9]*} + ${inodes%%[!0-9]*}))
} 2>/dev/null

next_measurement=0
check_limits() {
    if exceeds_process_limit || [[ -e $folder/steps/processes ]]; then reason=processes; fi
    if ((disk && now >= next_measurement)); then
        if (($(files_on_disk) + $(deleted_files) > disk)); then reason=disk; fi
        local began=$now
        clock
        # A job with very many files must not cost the node a CPU.
        next_measurement=$((now + 100 + 20 * (now - began)))
    fi
}

end_script() {
    signal_script TERM
    signal_script CONT
    wait_for_end "$GRACE"
    if has_init; then kill -KILL "$init"; fi 2>/dev/null
    kill -KILL -- "-$pid" 2>/dev/null
    wait_for_end 1000
    [[ -n $code ]] || code=137
}

# Kills orphaned processes of the script on this node, also if Slurm does not track detached processes.
# They are found by the mark, not by job ID, which another cluster on this machine may use too.
kill_orphans() {
    local file other parent orphans tries
    for ((tries = 0; tries < 40; tries++)); do
        orphans=()
        while IFS= read -r file; do
            other=${file#/proc/} other=${other%/environ}
            parent=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$other/status" 2>/dev/null)
            case " $$ $PPID $writer $BASHPID " in *" $other "* | *" ${parent:-none} "*) continue ;; esac
            # Stopped first: a shell would report the kill of its child in the output.
            kill -STOP "$other" 2>/dev/null && orphans+=("$other")
        done < <(grep -lszxF "GRID_RUN=$MARK" /proc/[0-9]*/environ)
        ((${#orphans[@]})) || return
        kill -KILL "${orphans[@]}" 2>/dev/null
        sleep 0.05
    done
}

reason="" walltime=8640000000
while [[ -z $code ]]; do
    clock
    read_control
    if [[ -z $reason ]]; then check_limits; fi
    if ((terminated)); then reason=terminated; fi
    if ((now - started >= walltime)); then reason=walltime; fi
    if [[ -n $reason ]]; then
        end_script
        break
    fi
    left=$((started + walltime - now))
    wait_for_end $((left < 100 ? left : 100))
done
clock
ended_at=$(date +%s.%N)
if has_init; then kill -KILL "$init"; fi 2>/dev/null
kill -KILL -- "-$pid" 2>/dev/null
if [[ -n $server ]]; then
    kill -KILL -- "-$server" 2>/dev/null
    # A killed step may have ended the script before the loop above checked the reason.
    if [[ -z $reason && -e $folder/steps/processes ]]; then reason=processes; fi
    rm -rf "$folder/steps"
fi
kill_orphans
if [[ -z $reason ]]; then
    reason=exited
    # bash returns 128 + N for signal N; a script that exits with such a code can't be distinguished.
    if ((code > 128 && code <= 192)); then reason=signalled; fi
    # SIGXFSZ: a single file would have exceeded the quota.
    if ((disk && code == 153)); then reason=disk; fi
    # The reason is in Slurm's state of the job.
    if ((terminated)); then reason=terminated; fi
elif ((code == 0)); then
    code=143 # a script that traps TERM and exits 0 was still stopped
fi

# The output is complete once write_output has ended; a process that escaped may keep its pipe open.
for ((tries = 0; tries < 20; tries++)); do
    kill -0 "$writer" 2>/dev/null || break
    sleep 0.05
done

printf '{"job":"%s","code":%d,"reason":"%s","centiseconds":%d,"started_at":%s,"ended_at":%s}' \
    "$JOB" "$code" "$reason" $((now - started)) "$started_at" "$ended_at" 1<>"$folder/.end"
sync "$folder/.end" 2>/dev/null
mv "$folder/.end" "$folder/end.json"
exit "$code"
