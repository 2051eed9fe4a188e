#!/bin/bash
# The `srun` of a job in the sandbox.
#
# A sandbox has no access to Slurm's network and keys. This script passes the call to the wrapper, which
# runs the real srun outside, and each task in its own sandbox. The wrapper treats the call as untrusted
# data: it refuses options that would leave the sandbox.
#
# Each call has five pipes in /run/job/steps, named by its ID: `call` transmits the arguments and the
# environment, and stays open until the caller ends, so that a step ends with its caller.

readonly STEPS=/run/job/steps
read -r call </proc/sys/kernel/random/uuid
pipes=$STEPS/$call

echo "$call" >"$STEPS/calls"
# The wrapper creates the pipes when it begins the step, `code` last.
until [[ -p $pipes.code ]]; do sleep 0.02; done
exec 9>"$pipes.call"
{
    printf '%s\0' "$#" "$@" "$PWD"
    env --null
    printf '\0'
} >&9
cat <"$pipes.out" 9>&- &
output_pid=$!
cat <"$pipes.err" >&2 9>&- &
errors_pid=$!
cat <&0 >"$pipes.in" 2>/dev/null 9>&- &
input_pid=$!
read -r code <"$pipes.code"
kill "$input_pid" 2>/dev/null
wait "$output_pid" "$errors_pid"
exit "${code:-1}"
