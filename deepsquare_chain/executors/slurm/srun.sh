#!/bin/bash
# What a job in the sandbox finds as `srun`.
#
# A sandbox has neither Slurm's network nor its keys. This passes the call to the wrapper, which runs the
# real srun outside and each task in a sandbox of its own. The call is data there: options that would
# leave the sandbox are refused.
#
# A call takes one of the slots in /run/job/steps, each with five pipes: `call` carries the arguments and the
# environment, and stays open until the caller ends, so that a step ends with the one who called it.

readonly STEPS=/run/job/steps SLOTS=16
slot=""
while [[ -z $slot ]]; do
    for ((number = 0; number < SLOTS; number++)); do
        # Shared by everything in this sandbox; of a caller that was killed, its number is left.
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
# Made with the first call of the slot.
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
