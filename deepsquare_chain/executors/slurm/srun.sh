#!/bin/bash
# The `srun` of a job in the sandbox.
#
# A sandbox has no access to Slurm's network and keys. This script passes the call to the wrapper, which
# runs the real srun outside, and each task in its own sandbox. The wrapper treats the call as untrusted
# data: it refuses options that would leave the sandbox.
#
# A call uses one of the slots in /run/job/steps, each with five pipes: `call` transmits the arguments and
# the environment, and stays open until the caller ends, so that a step ends with its caller.

readonly STEPS=/run/job/steps SLOTS=16
slot=""
while [[ -z $slot ]]; do
    for ((number = 0; number < SLOTS; number++)); do
        # A lock shared by all processes of this sandbox; a killed caller leaves its pid.
        lock=/tmp/.srun-$number
        if mkdir "$lock" 2>/dev/null; then
            slot=$number
            break
        fi
        owner=$(cat "$lock/pid" 2>/dev/null)
        if [[ -n $owner && ! -e /proc/$owner ]]; then rm -rf "$lock"; fi
    done
    [[ -n $slot ]] || sleep 0.1
done
echo $$ >"$lock/pid"
trap 'rm -rf "$lock"' EXIT
pipes=$STEPS/$slot

echo "$slot" >"$STEPS/calls"
# The wrapper creates the pipes on the first call of the slot.
until [[ -p $pipes.code ]]; do sleep 0.02; done
exec 9>"$pipes.call"
{
    printf '%s\0' "$#" "$@" "$PWD"
    env --null
    printf '\0'
} >&9
cat <"$pipes.out" 9>&- &
output=$!
cat <"$pipes.err" >&2 9>&- &
errors=$!
cat <&0 >"$pipes.in" 2>/dev/null 9>&- &
input=$!
read -r code <"$pipes.code"
kill "$input" 2>/dev/null
wait "$output" "$errors"
exit "${code:-1}"
