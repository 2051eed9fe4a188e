"""Renders a definition to the bash script that an executor runs. Pure.

The script consists of fixed functions (`runtime.sh`, and `transfers.sh`, `containers.sh` and
`networks.sh` if needed), one function per step, and quoted data. All customer text is quoted and
never starts a line, so that a batch system does not find directives in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.job import Resources
from deepsquare_chain.workflow.abilities import RUNTIMES, required_runtime
from deepsquare_chain.workflow.definition import Definition, Step
from deepsquare_chain.workflow.schema import (
    ContainerSection,
    ForSection,
    LaunchSection,
    RunSection,
    S3Section,
    TransferSection,
    UseSection,
)
from deepsquare_chain.workflow.steps import (
    LIBRARIES,
    NETWORK_LIBRARY,
    VirtualNetworks,
    command_argument,
    container_lines,
    exports,
    has_network,
    network_lines,
    quote,
)
from deepsquare_chain.workflow.validation import handle, walk

_HEADER: Final = """\
#!/usr/bin/env bash
# Generated from a job definition. Steps run in order, each in its own shell; the first that
# fails ends the job with its exit code.
# shellcheck disable=SC2016,SC2030,SC2031,SC2041,SC2043,SC2317,SC2329
"""
#: Folder in the working folder with the script's own files, such as keys of networks and logins; the
#: script removes it when it ends.
STATE_FOLDER: Final = ".deepsquare"
#: Seconds between two transfers of the output while the job runs.
SYNC_INTERVAL: Final = 5


@dataclass(frozen=True, slots=True)
class ExecutionSite:
    """The tested abilities of the provider that a script may use; see `abilities.ABILITIES`."""

    abilities: frozenset[str] = field(default_factory=frozenset)

    def runtime(self, run: RunSection, container: ContainerSection) -> str:
        """Return the container runtime to use for a step.

        Raises:
            ValueError: The provider has no suitable runtime.
        """
        required = required_runtime(run, container)
        usable = [
            runtime
            for runtime in RUNTIMES
            if runtime in self.abilities
            and required in {None, runtime}
            and (not has_network(run) or self._has_network(runtime, run))
        ]
        if not usable:
            raise ValueError(f"this provider does not have {required or 'container runtime'}")
        return usable[0]

    def _has_network(self, runtime: str, run: RunSection) -> bool:
        """Whether a runtime can run a step in a network namespace of its own."""
        if runtime == "podman":  # makes the namespace itself
            return "netns" in self.abilities and not run.custom_network_interfaces
        return "netns.interfaces" in self.abilities


def render_script(
    definition: Definition, job_env: Mapping[str, str], site: ExecutionSite | None = None
) -> bytes:
    """Render the script of a job.

    `job_env` are variables that the grid sets for the job, such as `DEEPSQUARE_JOB_ID`.

    Raises:
        ValueError: A name in `job_env` is not an identifier, a value contains a NUL, or a step
            needs a feature that this provider does not have.
    """
    return _Script(definition, job_env, site or ExecutionSite()).render().encode()


def grid_env(definition: Definition) -> dict[str, str]:
    """Return the variables that describe the resources allocated to a job; memory in MB."""
    resources = definition.resources
    variables = {
        "NTASKS": resources.tasks,
        "CPUS_PER_TASK": resources.cpus_per_task,
        "MEM_PER_CPU": resources.mem_per_cpu,
        "GPUS_PER_TASK": resources.gpus // resources.tasks,
        "GPUS": resources.gpus,
        "CPUS": resources.cpus,
        "MEM": resources.memory,
        "DEEPSQUARE_TASKS": resources.tasks,
        "DEEPSQUARE_CPUS_PER_TASK": resources.cpus_per_task,
        "DEEPSQUARE_MEM_PER_CPU": resources.mem_per_cpu,
        "DEEPSQUARE_GPUS": resources.gpus,
    }
    if definition.array is not None:
        variables["DEEPSQUARE_ARRAY_INDEX"] = definition.array.index
        variables["DEEPSQUARE_ARRAY_SIZE"] = definition.array.size
    return {name: str(value) for name, value in variables.items()}


@dataclass(frozen=True, slots=True)
class _Scope:
    """The enclosing modules and loops of steps.

    `modules` names the functions that export inputs of modules; `loops` the loop variables.
    """

    modules: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()

    def in_loop(self, loop: ForSection) -> _Scope:
        name = "index" if loop.range else "item"
        return _Scope(self.modules, tuple(sorted({*self.loops, name})))

    def in_module(self, function: str) -> _Scope:
        return _Scope((*self.modules, function), self.loops)

    def lines(self) -> list[str]:
        """Return the lines that set the variables of this scope for a step."""
        loops = [f'export {name}="$DEEPSQUARE_{name.upper()}"' for name in self.loops]
        return [*self.modules, *loops]


class _Script:
    def __init__(
        self, definition: Definition, job_env: Mapping[str, str], site: ExecutionSite
    ) -> None:
        self._definition = definition
        self._grid_env = {**grid_env(definition), **job_env}
        self._site = site
        runs = [step.run for _, step in walk(definition.steps) if step.run]
        self._has_networks = any(has_network(run) for run in runs)
        self._virtual = VirtualNetworks(definition.virtual_networks, runs)
        self._functions: list[str] = []
        self._count = 0

    def render(self) -> str:
        definition = self._definition
        environment = self._function("job_environment", self._environment())
        main = self._main(self._steps(definition.steps, _Scope()))
        parts = [_HEADER, "\n", LIBRARIES["runtime.sh"]]
        if definition.input or definition.output:
            parts.append(LIBRARIES["transfers.sh"])
        if any(step.run and step.run.container for _, step in walk(definition.steps)):
            parts.append(LIBRARIES["containers.sh"])
        if self._has_networks:
            parts.append(NETWORK_LIBRARY)
        parts += ["\n# -- the job\n\n", environment, *self._functions, main]
        return "".join(parts)

    # -- the whole job

    def _environment(self) -> list[str]:
        lines = exports(self._definition.env)
        lines += ['export STORAGE_PATH="$DEEPSQUARE_STORAGE"', *exports(self._grid_env)]
        names = [*self._definition.env, *self._grid_env, "STORAGE_PATH"]
        names += [f"DEEPSQUARE_{name}" for name in ("INPUT", "OUTPUT", "ENV", "ERROR_CODE", "TMP")]
        names += ["DEEPSQUARE_SHARED_TMP", "DEEPSQUARE_SHARED_WORLD_TMP"]
        names += ["DEEPSQUARE_DISK_TMP", "DEEPSQUARE_DISK_WORLD_TMP"]
        return [*lines, f"DEEPSQUARE_CONTAINER_ENV=({' '.join(map(quote, names))})", "load_env"]

    def _main(self, main: str) -> str:
        definition = self._definition
        hubs = self._virtual.start_lines()
        lines = [f"create_folders {STATE_FOLDER}", *(["HUBS=()"] if hubs else [])]
        lines += ["trap 'exit 143' TERM", "trap 'exit 130' INT", "trap 'end_job \"$?\"' EXIT"]
        end = ["local code=$1", "trap - EXIT", "trap : TERM INT"]
        end += ["stop_virtual_networks"] if hubs else []
        if definition.input is not None:
            lines += [f"run_in_subshell {self._download_input(definition.input)} || exit"]
        output = definition.output
        if definition.continuous_output_sync and output is not None and output.s3 is not None:
            lines.insert(1, 'SYNC=""')
            lines += [f"run_in_background {self._sync_output(output.s3)} &", "SYNC=$!"]
            end += ['if [[ -n $SYNC ]]; then kill "$SYNC"; wait "$SYNC"; fi 2>/dev/null']
        lines += [f"{line} || exit" for line in hubs]
        if output is not None:
            end += [f"run_in_subshell {self._upload_output(output)} || code=$((code ? code : $?))"]
        end += ["remove_folders", 'exit "$code"']
        lines += [main, "exit"]
        return self._function("end_job", end) + "".join(f"{line}\n" for line in lines)

    # -- data

    def _download_input(self, transfer: TransferSection) -> str:
        if transfer.http is not None:
            name = _file_name(transfer.http.url)
            lines = [
                *_curl_config(transfer.http.url),
                f'file="$DEEPSQUARE_INPUT/"{quote(name)}',
                'retry download_url "$config" "$file" || exit',
                'extract_archive "$file" "$DEEPSQUARE_INPUT" || exit',
            ]
        elif transfer.s3 is not None:
            bucket = transfer.s3
            lines = [
                *_s3_env(bucket),
                f'retry download_bucket {_s3_url(bucket)} "$DEEPSQUARE_INPUT" {quote(bucket.region)} || exit',
            ]
        else:
            lines = []
        mode = self._definition.input_mode
        lines.append(f'chmod -R {0o700 if mode is None else mode:o} "$DEEPSQUARE_INPUT"')
        return self._add(["exit_on_signals", *lines])

    def _upload_output(self, transfer: TransferSection) -> str:
        if transfer.http is not None:
            lines = [
                *_curl_config(transfer.http.url),
                'retry upload_output "$config" "$DEEPSQUARE_OUTPUT"',
            ]
        else:
            lines = self._upload_bucket(transfer.s3, is_last=True)
        return self._add(lines)

    def _upload_bucket(self, bucket: S3Section | None, *, is_last: bool) -> list[str]:
        if bucket is None:
            return []
        delete = " --delete" if bucket.delete_sync and is_last else ""
        call = (
            f'upload_bucket "$DEEPSQUARE_OUTPUT" {_s3_url(bucket)} {quote(bucket.region)}{delete}'
        )
        return [*_s3_env(bucket), f"retry {call}" if is_last else f"{call} 2>/dev/null"]

    def _sync_output(self, bucket: S3Section) -> str:
        *env, call = self._upload_bucket(bucket, is_last=False)
        return self._add(
            [*env, "while :; do", f"    sleep {SYNC_INTERVAL} & wait $!", f"    {call}", "done"]
        )

    # -- steps

    def _steps(self, steps: Sequence[Step], scope: _Scope) -> str:
        """Add a function that runs steps one after the other, and return its name."""
        lines = [f"{self._step(step, scope)} || return" for step in steps]
        inner = self._add(lines)
        if not any(step.launch for step in steps):
            return inner
        return self._add([f"run_and_wait {inner}"])

    def _step(self, step: Step, scope: _Scope) -> str:
        lines = []
        if step.depends_on:
            names = " ".join(quote(handle(name)) for name in step.depends_on)
            lines.append(f"wait_for_handles {names} || return")
        if step.if_ is not None:
            lines.append(
                f"test_condition {self._condition(step.if_, scope)} || return $(($? == 1 ? 0 : $?))"
            )
        body = self._body(step, scope)
        if step.catch or step.finally_:
            catch = self._steps(step.catch, scope) if step.catch else ""
            last = self._steps(step.finally_, scope) if step.finally_ else ""
            body = self._add([f"run_with_handlers {body or ':'} {quote(catch)} {quote(last)}"])
        if step.launch:
            lines.append(_launch(step.launch, body))
        elif body:
            lines.append(f"run_in_subshell {body}")
        return self._add(lines)

    def _body(self, step: Step, scope: _Scope) -> str:
        if step.run:
            return self._run(step.run, scope)
        if step.for_:
            return self._for(step.for_, scope)
        if step.launch:
            return self._steps(step.launch.steps, scope)
        if step.use:
            return self._use(step.use, scope)
        return self._steps(step.steps, scope) if step.steps else ""

    def _condition(self, test: str, scope: _Scope) -> str:
        script = f"if [[ {test} ]]; then exit 10; else exit 11; fi"
        lines = ["job_environment", *scope.lines()]
        return self._add(['set -- "$BASH"', *lines, f'exec "$1" -c {quote(script)}'])

    def _for(self, loop: ForSection, scope: _Scope) -> str:
        inner = self._steps(loop.steps, scope.in_loop(loop))
        if loop.range is not None:
            step = loop.range.increment or 1
            test = "<=" if step > 0 else ">="
            head = f"for ((index = {loop.range.begin}; index {test} {loop.range.end}; index += {step})); do"
            name = "index"
        else:
            items = " ".join(quote(item) for item in loop.items or ())
            name, head = "item", f"for item in {items}; do"
        lines = [f"local {name}", head, f"    DEEPSQUARE_{name.upper()}=${name}"]
        if loop.parallel:
            lines[0:1] = [f"local {name} pids=()", "trap 'wait; exit 143' TERM"]
            lines += [f"    run_in_background {inner} &", '    pids+=("$!")', "done"]
            lines += ['wait_for_iterations "${pids[@]}"']
        else:
            lines += [f"    run_in_subshell {inner} || return", "done"]
        return self._add(lines)

    def _use(self, use: UseSection, scope: _Scope) -> str:
        if use.module is None:
            raise ValueError(
                f"the module {use.source[:80]} was not fetched when the job was submitted"
            )
        env = use.module.env
        names = " ".join(quote(name) for name in env)
        inputs = self._add(
            [*exports(env), *([f"DEEPSQUARE_CONTAINER_ENV+=({names})"] if names else [])]
        )
        inner = self._steps(use.module.steps, scope.in_module(inputs))
        name = f"env.module-{self._count}"
        lines = [
            "exit_on_signals",
            "outer=$DEEPSQUARE_ENV",
            f'DEEPSQUARE_ENV="$DEEPSQUARE_STORAGE/"{name}',
            'cp "$outer" "$DEEPSQUARE_ENV" || exit',
            f"run_in_subshell {inner} || exit",
        ]
        if use.export_env_as and use.module.outputs:
            outputs = " ".join(quote(output) for output in use.module.outputs)
            lines += [f'export_outputs "$outer" {quote(use.export_env_as)} {outputs}']
        return self._add(lines)

    def _run(self, run: RunSection, scope: _Scope) -> str:
        lines = [_launcher(run, self._definition.resources)]
        resources = run.resources
        env = dict(run.env)
        if resources is not None and resources.gpus_per_task is not None:
            env = {"GPUS_PER_TASK": str(resources.gpus_per_task), **env}
        runtime = None if run.container is None else self._site.runtime(run, run.container)
        if has_network(run) and runtime != "podman":
            lines += network_lines(run, self._virtual)
        if run.container is None:
            # Few hosts have /bin/ash; where one has, it is /bin/sh as well.
            shell = "/bin/sh" if run.shell == "/bin/ash" else run.shell or '"$BASH"'
            lines.append(f'set -- "$@" {" ".join([*_user_namespace(run), shell])}')
        lines += ["job_environment", *scope.lines(), *exports(env)]
        lines.append('cd "$DEEPSQUARE_STORAGE" || exit')
        if run.container is None or runtime is None:
            if run.work_dir is not None:
                lines.append(f"mkdir -p {quote(run.work_dir)} && cd {quote(run.work_dir)} || exit")
            lines.append(f'exec "$@" -c {command_argument(run.command)}')
        else:
            names = " ".join(quote(name) for name in (*scope.loops, *env))
            lines += [f"DEEPSQUARE_CONTAINER_ENV+=({names})"] if names else []
            lines += container_lines(runtime, run, run.container)
        return self._add(lines)

    # -- functions

    def _add(self, lines: Iterable[str]) -> str:
        self._count += 1
        name = f"step_{self._count}"
        self._functions.append(self._function(name, lines))
        return name

    @staticmethod
    def _function(name: str, lines: Iterable[str]) -> str:
        body = "".join(f"    {line}\n" for line in lines) or "    :\n"
        return f"{name}() {{\n{body}}}\n"


def _launch(launch: LaunchSection, body: str) -> str:
    name = "" if launch.handle_name is None else handle(launch.handle_name)
    signal = launch.signal_on_parent_step_exit
    return f"launch {body} {quote(name)} {quote('' if signal is None else str(signal))}"


def _launcher(run: RunSection, job: Resources) -> str:
    """Return the line that sets the launcher: `srun` in a Slurm job, else `mpirun` for several tasks.

    A step that asks for tasks gets the job's CPUs and memory for each of them, and no others: steps in
    the background run at the same time then.
    """
    resources = run.resources
    if resources is None and run.mpi is None and not run.disable_cpu_binding:
        return "set --"
    tasks = (resources.tasks if resources else None) or 1
    launcher = ["srun", f"--ntasks={tasks}"]
    if resources is not None:
        for name, value in (
            ("cpus-per-task", resources.cpus_per_task or job.cpus_per_task),
            ("mem-per-cpu", resources.mem_per_cpu or job.mem_per_cpu),
            ("gpus-per-task", resources.gpus_per_task),
        ):
            launcher += [] if value is None else [f"--{name}={value}"]
    launcher += [] if run.mpi is None else [f"--mpi={run.mpi}"]
    launcher += ["--cpu-bind=none"] if run.disable_cpu_binding else []
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(tasks)]
    fallback = " ".join(["set", "--", *(mpirun if tasks > 1 else [])])
    return f"if [[ -n ${{SLURM_JOB_ID-}} ]]; then set -- {' '.join(launcher)}; else {fallback}; fi"


def _user_namespace(run: RunSection) -> list[str]:
    if has_network(run) or (run.map_uid is None and run.map_gid is None):
        return []
    words = ["unshare", "--user"]
    words += [] if run.map_uid is None else [f"--map-user={run.map_uid}"]
    words += [] if run.map_gid is None else [f"--map-group={run.map_gid}"]
    return words


def _curl_config(url: str) -> list[str]:
    escaped = url.replace("\\", "\\\\").replace('"', '\\"')
    line = quote(f'url = "{escaped}"')
    return [
        "local config file",
        "config=$DEEPSQUARE_STATE/address",
        f"(umask 077 && printf '%s\\n' {line} >\"$config\") || exit",
    ]


def _s3_env(bucket: S3Section) -> list[str]:
    return exports(
        {
            "AWS_ACCESS_KEY_ID": bucket.access_key_id,
            "AWS_SECRET_ACCESS_KEY": bucket.secret_access_key,
            "AWS_REGION": bucket.region,
            "S3_ENDPOINT_URL": bucket.endpoint_url,
        }
    )


def _s3_url(bucket: S3Section) -> str:
    path = "/".join(part for part in bucket.path.split("/") if part)
    return quote(f"{bucket.bucket_url}/{path}")


def _file_name(url: str) -> str:
    """Derive a plain file name from the path of a URL."""
    path = url.split("?", 1)[0].split("#", 1)[0].rstrip("/")
    last = path.split("/")[-1] if "/" in url[8:] else ""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in last)
    return plain.lstrip(".")[:200] or "input"
