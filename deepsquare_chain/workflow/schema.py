"""The keys of job files and definitions: one model per section.

Names and meanings are those of DeepSquare's workflow format; our additions are in
`JobFileDocument`. `validation` checks rules between keys, and formats the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema

from deepsquare_chain.job import MAX_PREFERENCES, Objective, Placement
from deepsquare_chain.notification import MAX_TARGETS, Occasion
from deepsquare_chain.workflow import checks


@dataclass(frozen=True)
class _Checked:
    """A field type validated by one function of `checks`, with its JSON schema for editors."""

    check: Callable[[Any], Any]
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"}, hash=False)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(self.schema)


def _whole(low: int, high: int, unit: str = "") -> _Checked:
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return _Checked(checks.whole(low, high, unit), schema)


def _choice(*allowed: str) -> _Checked:
    return _Checked(checks.choice(*allowed), {"type": "string", "enum": list(allowed)})


def _text(check: Callable[[Any], str], **schema: Any) -> _Checked:
    return _Checked(check, {"type": "string", **schema})


#: Values that are accepted as text without quotes.
_PLAIN: Final = {"type": ["string", "number", "boolean"]}
_ENV_JSON: Final = {
    "oneOf": [
        {"type": "object", "additionalProperties": _PLAIN},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"key": {"type": "string"}, "value": _PLAIN},
                "required": ["key", "value"],
                "additionalProperties": False,
            },
        },
    ]
}

Count = Annotated[int, _whole(1, checks.UINT16_MAX)]
Gpus = Annotated[int, _whole(0, checks.UINT16_MAX)]
Memory = Annotated[int, _whole(1, checks.UINT24_MAX, "MB")]
Number = Annotated[int, _whole(-(2**31), 2**31 - 1)]
Natural = Annotated[int, _whole(0, 2**31 - 1)]
Port = Annotated[int, _whole(1, 65_535)]
Signal = Annotated[int, _whole(0, 64)]
Retries = Annotated[int, _whole(0, checks.MAX_RETRIES)]
FileMode = Annotated[
    int, _Checked(checks.file_mode, {"type": "integer", "minimum": 0, "maximum": 511})
]
Duration = Annotated[int, _Checked(checks.duration, {"type": ["integer", "string"]})]
StartTime = Annotated[
    checks.StartTime, _Checked(checks.start_time, {"type": ["integer", "string"]})
]
Amount = Annotated[int, _Checked(checks.amount, {"type": ["number", "string"]})]
Flag = Annotated[bool, _Checked(checks.boolean, {"type": "boolean"})]
Name = Annotated[str, _text(checks.name, maxLength=checks.MAX_NAME_BYTES)]
StepName = Annotated[str, _text(checks.step_name, maxLength=checks.MAX_STEP_NAME_BYTES)]
Line = Annotated[str, _text(checks.line)]
Path = Annotated[str, _text(checks.absolute_path, pattern="^/")]
MountPath = Annotated[str, _text(checks.mount_path, pattern="^/")]
WebUrl = Annotated[str, _text(checks.web_url, format="uri")]
BucketUrl = Annotated[str, _text(checks.bucket_url, pattern="^s3://")]
BucketPath = Annotated[str, _text(checks.bucket_path, pattern="^/")]
Image = Annotated[str, _text(checks.image)]
Registry = Annotated[str, _text(checks.registry)]
Runtime = Annotated[str, _choice("apptainer", "charliecloud", "enroot", "podman")]
MountOptions = Annotated[str, _choice("ro", "rw")]
Endpoint = Annotated[str, _text(checks.endpoint)]
Hostname = Annotated[str, _text(checks.hostname)]
PlainName = Annotated[str, _text(checks.plain_name)]
HandleName = Annotated[str, _text(checks.handle_name, pattern="^[A-Za-z0-9_]+$")]
Address = Annotated[str, _text(checks.cidr)]
IpAddress = Annotated[str, _text(checks.ip_address)]
Command = Annotated[str, _text(checks.command)]
Condition = Annotated[str, _text(checks.condition)]
ModuleSource = Annotated[str, _text(checks.module_source)]
Shell = Annotated[str, _choice("/bin/bash", "/bin/ash", "/bin/sh", "ENTRYPOINT")]
Network = Annotated[str, _choice("host", "slirp4netns", "pasta")]
OccasionWord = Annotated[str, _choice(*Occasion)]
Mpi = Annotated[str, _choice("none", "pmix_v4", "pmi2")]
EnvName = Annotated[str, _text(checks.env_name, pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
EnvValue = Annotated[str, _Checked(checks.env_value, _PLAIN)]
Env = Annotated[
    dict[EnvName, EnvValue],
    BeforeValidator(checks.env_list),
    Field(max_length=checks.MAX_ENV),
    WithJsonSchema(_ENV_JSON),
]
ObjectiveWord = Annotated[
    Objective, _Checked(checks.objective, {"type": "string", "enum": list(Objective.__members__)})
]
Uses = Annotated[list[Annotated[str, _text(checks.affinity)]], AfterValidator(checks.total_uses)]
Recipient = Annotated[str, _text(checks.recipient, pattern="^age1")]
Encrypted = Annotated[str, _text(checks.encrypted)]
_BOUNDED: Final = Field(max_length=checks.MAX_LIST)


class Section(BaseModel):
    """A mapping of a job file; an optional key with the value `null` counts as not given."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_default=False,
        validate_by_name=True,
        validate_by_alias=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        optional = {
            key
            for name, field in cls.model_fields.items()
            if not field.is_required()
            for key in (name, field.alias)
        }
        return {key: item for key, item in value.items() if item is not None or key not in optional}


class ResourcesSection(Section):
    """Resources that are allocated to the job and paid for."""

    tasks: Count = Field(1, description="Processes of the job.")
    cpus_per_task: Count = Field(1, description="CPU threads per task.")
    mem_per_cpu: Memory = Field(description="MB of memory per CPU.")
    gpus: Gpus = Field(0, description="GPUs of the whole job.")


class StepResourcesSection(Section):
    """The part of the job's resources that a step uses; without it, the step sees all of them."""

    tasks: Count | None = Field(None, description="Processes of the step; 1 if not given.")
    cpus_per_task: Count | None = Field(None, description="CPU threads per task; the job's.")
    mem_per_cpu: Memory | None = Field(None, description="MB of memory per CPU; the job's.")
    gpus_per_task: Gpus | None = Field(None, description="GPUs per task of the step.")


class HttpSection(Section):
    """Data by HTTP or HTTPS."""

    url: WebUrl = Field(description="Address.")


class S3Section(Section):
    """Data in an S3 bucket."""

    region: Line = Field(description="Region of the bucket.")
    bucket_url: BucketUrl = Field(description="s3://BUCKET without a slash at the end.")
    path: BucketPath = Field(description="Folder or object in the bucket, from /.")
    access_key_id: Line = Field(description="Access key.")
    secret_access_key: Line = Field(description="Secret key.")
    endpoint_url: WebUrl = Field(description="Address of the S3 service.")
    delete_sync: Flag = Field(
        False,
        description="Remove files at the destination that the source does not have; output only.",
    )


class TransferSection(Section):
    """Source or destination of data: `http` or `s3`."""

    http: HttpSection | None = Field(None, description="HTTP or HTTPS.")
    s3: S3Section | None = Field(None, description="An S3 bucket.")


class MountSection(Section):
    """A folder of the provider in the container."""

    host_dir: MountPath = Field(description="Folder or file of the provider.")
    container_dir: MountPath = Field(description="Path in the container.")
    options: MountOptions = Field(description="ro or rw.")


class ContainerSection(Section):
    """The container image of a step."""

    image: Image = Field(
        description="image[:tag][@sha256:digest], or an absolute path below STORAGE_PATH."
    )
    registry: Registry | None = Field(
        None, description="Host name of the registry; registry-1.docker.io if not given."
    )
    username: Line | None = Field(None, description="Login of the registry.")
    password: Line | None = Field(None, description="Password of the registry.")
    apptainer: Flag = Field(False, description="Run in Apptainer.")
    deepsquare_hosted: Flag = Field(
        False, description="An unpacked image stored by the provider; implies apptainer."
    )
    runtime: Runtime | None = Field(
        None, description="Required container runtime; any of the provider if not given."
    )
    mounts: Annotated[list[MountSection], _BOUNDED] = Field(
        [], description="Folders of the provider to mount."
    )
    mount_home: Flag = Field(False, description="Mount the home folder.")
    read_only_root_fs: Flag = Field(
        False, alias="readOnlyRootFS", description="Make the root file system read-only."
    )
    x11: Flag = Field(False, description="Mount the sockets of X11.")


class WireguardPeerSection(Section):
    """A peer of a WireGuard interface."""

    public_key: Line = Field(description="Public key of the peer.")
    pre_shared_key: Line | None = Field(None, description="Key shared with the peer.")
    allowed_ips: Annotated[list[Address], _BOUNDED] = Field(
        [], alias="allowedIPs", description="Networks reached through the peer."
    )
    endpoint: Endpoint | None = Field(None, description="host:port of the peer.")
    persistent_keepalive: Natural | None = Field(
        None, description="Seconds between keepalive packets."
    )


class WireguardSection(Section):
    """A WireGuard interface."""

    address: Annotated[list[Address], _BOUNDED] = Field(
        [], description="Addresses of the interface."
    )
    private_key: Line = Field(description="Private key of the interface.")
    peers: Annotated[list[WireguardPeerSection], _BOUNDED] = Field([], description="Peers.")


class BoreSection(Section):
    """A tunnel from a public bore server to a port of the step."""

    bore_address: Endpoint | None = Field(None, description="host:port of the server.")
    target_port: Port = Field(description="Port in the step.")
    secret: Line | None = Field(None, description="Token of a fixed address.")
    address: Hostname | None = Field(None, description="Server; deprecated, use boreAddress.")
    port: Port | None = Field(None, description="Port of the server; deprecated, use boreAddress.")


class VnetSection(Section):
    """An interface in a virtual network of the job."""

    name: PlainName = Field(description="One of virtualNetworks.")
    address: Address = Field(description="Address of the interface.")


class InterfaceSection(Section):
    """A network interface of a step: `wireguard`, `bore` or `vnet`."""

    wireguard: WireguardSection | None = Field(None, description="A WireGuard interface.")
    bore: BoreSection | None = Field(None, description="A tunnel to a public server.")
    vnet: VnetSection | None = Field(None, description="An interface in a virtual network.")


class VirtualNetworkSection(Section):
    """A network between steps of the job."""

    name: PlainName = Field(description="Name of the network.")
    gateway_address: Address = Field(description="Address of its gateway.")


class RunSection(Section):
    """A command."""

    command: Command = Field(
        description="Script, or arguments of the image's entrypoint with shell ENTRYPOINT."
    )
    shell: Shell | None = Field(
        None, description="Shell; bash on the host and /bin/sh in a container if not given."
    )
    env: Env = Field({}, description="Variables of the step.")
    work_dir: Path | None = Field(
        None, description="Working folder; STORAGE_PATH, or the image's, if not given."
    )
    resources: StepResourcesSection | None = Field(
        None, description="Share of the job; all of it if not given."
    )
    container: ContainerSection | None = Field(None, description="Image in which it runs.")
    network: Network | None = Field(None, description="Network namespace; host if not given.")
    dns: Annotated[list[IpAddress], _BOUNDED] = Field(
        [], description="Name servers in the namespace."
    )
    custom_network_interfaces: Annotated[list[InterfaceSection], _BOUNDED] = Field(
        [], description="Interfaces in the namespace."
    )
    map_uid: Natural | None = Field(None, description="User ID in a user namespace.")
    map_gid: Natural | None = Field(None, description="Group ID in a user namespace.")
    mpi: Mpi | None = Field(None, description="MPI flavour; the provider's if not given.")
    disable_cpu_binding: Flag = Field(False, description="Do not bind tasks to CPUs.")


class RangeSection(Section):
    """The range of numbers of a loop."""

    begin: Number = Field(description="First number.")
    end: Number = Field(description="Last number.")
    increment: Number = Field(1, description="Difference between two numbers; 0 means 1.")


class ForSection(Section):
    """A loop over `range` ($index) or `items` ($item)."""

    parallel: Flag = Field(description="Run all iterations at once.")
    range: RangeSection | None = Field(None, description="Numbers, as $index.")
    items: Annotated[list[EnvValue], Field(max_length=checks.MAX_STEPS)] | None = Field(
        None, description="Texts, as $item."
    )
    steps: Steps = Field(description="Steps of an iteration.")


class LaunchSection(Section):
    """Steps that run in the background."""

    handle_name: HandleName | None = Field(None, description="Name for dependsOn.")
    signal_on_parent_step_exit: Signal | None = Field(
        None,
        description="Signal when the enclosing steps are over; awaited without one if not given.",
    )
    steps: Steps = Field(description="Steps that run in the background.")


class UseSection(Section):
    """A module: steps from a git repository or a folder.

    `commit` and `module` appear only in definitions: they hold the module fetched when the job was
    submitted. The commit of a local module is the SHA-256 of its file.
    """

    source: ModuleSource = Field(
        description="HOST/OWNER/REPOSITORY[/FOLDER][@TAG or @COMMIT], or a local folder."
    )
    args: Env = Field({}, description="Inputs of the module.")
    export_env_as: EnvName | None = Field(None, description="Prefix of the module's outputs.")
    steps: OptionalSteps = Field([], description="Steps that are passed to the module.")
    commit: Line | None = Field(None, description="Written when the job is submitted.")
    module: ModuleSection | None = Field(None, description="Written when the job is submitted.")


class ModuleSection(Section):
    """The steps of a module, as fetched when the job was submitted."""

    env: Env = Field({}, description="Inputs, with defaults.")
    outputs: Annotated[list[EnvName], _BOUNDED] = Field([], description="Names of outputs.")
    steps: Steps = Field(description="Steps of the module.")


class StepSection(Section):
    """A step: one of `run`, `for`, `launch`, `use` or `steps`."""

    name: StepName = Field("", description="Name of the step, shown on the page of the job.")
    depends_on: Annotated[list[HandleName], _BOUNDED] = Field(
        [], description="Handles of launched steps to wait for."
    )
    if_: Condition | None = Field(
        None, alias="if", description="Condition in bash; if it is false, the step is skipped."
    )
    run: RunSection | None = Field(None, description="A command.")
    for_: ForSection | None = Field(None, alias="for", description="A loop.")
    launch: LaunchSection | None = Field(None, description="Steps in the background.")
    use: UseSection | None = Field(None, description="A module.")
    steps: Steps | None = Field(None, description="A group of steps.")
    catch: OptionalSteps = Field(
        [],
        description="Steps that run if the step failed; $DEEPSQUARE_ERROR_CODE is its exit code.",
    )
    finally_: OptionalSteps = Field(
        [], alias="finally", description="Steps that always run after the step."
    )

    @classmethod
    def simple(cls, name: str, command: str, env: dict[str, str] | None = None) -> Self:
        """Return a step that runs one command."""
        return cls(name=name, run=RunSection(command=command, env=env or {}))


OptionalSteps = Annotated[list[StepSection], Field(max_length=checks.MAX_STEPS)]
Steps = Annotated[OptionalSteps, Field(min_length=1)]


class ArraySection(Section):
    """Index and size of a job array: DEEPSQUARE_ARRAY_INDEX and _SIZE; set by the client."""

    index: Natural = Field(description="Index of the job.")
    size: Natural = Field(description="Number of jobs.")


class Runnable(Section):
    """The keys that job files and definitions have in common."""

    resources: ResourcesSection = Field(description="Resources allocated to the job.")
    env: Env = Field({}, description="Variables of the whole job.")
    input: TransferSection | None = Field(
        None, description="Data for $DEEPSQUARE_INPUT, before the first step."
    )
    input_mode: FileMode | None = Field(
        None, description="Mode of the input files, decimal: 493 is 0755."
    )
    steps: Steps = Field(description="Steps, which run one after the other.")
    output: TransferSection | None = Field(
        None, description="Where $DEEPSQUARE_OUTPUT goes at the end, also after a failure."
    )
    continuous_output_sync: Flag = Field(
        False, description="Send the output to S3 also while the job runs."
    )
    virtual_networks: Annotated[list[VirtualNetworkSection], _BOUNDED] = Field(
        [], description="Networks between steps."
    )
    recipients: Annotated[list[Recipient], Field(max_length=checks.MAX_RECIPIENTS)] = Field(
        [], description="Public keys (age1...) to which log and results are encrypted."
    )


class DefinitionDocument(Runnable):
    """A definition, as it is stored."""

    version: Literal[1]
    array: ArraySection | None = None
    secrets: Encrypted | None = None


class NotifySection(Section):
    """Notifications of a job; kept by the customer, not part of the definition."""

    to: Annotated[
        list[Annotated[str, _text(checks.notify_target)]],
        Field(min_length=1, max_length=MAX_TARGETS),
    ] = Field(description="E-mail addresses and URLs of webhooks.")
    on: Annotated[list[OccasionWord], Field(min_length=1, max_length=len(Occasion))] = Field(
        ["end"], description="When: begin, end, fail, requeue or all."
    )


class JobFileDocument(Runnable):
    """A job file: the steps, and the terms of the submission."""

    enable_logging: Flag = Field(
        False, description="Accepted; the output of a job is always kept for its customer."
    )
    name: Name = Field("", description="Name of the job, at most 64 bytes.")
    time_limit: Duration | None = Field(
        None, description="Seconds, or a text such as 10m, 1h30m or 01:30:00."
    )
    credits: Amount | None = Field(None, description="Credits for escrow, such as 1.5.")
    objective: ObjectiveWord = Field(Objective.COST, description="COST, TIME or ENERGY.")
    retries: Retries = Field(
        0, description="Maximum number of restarts at other providers if its provider is lost."
    )
    until_spent: Flag = Field(False, description="Run until the credits are spent.")
    interim_payments: Flag = Field(
        False, description="The provider may collect interim payments while the job runs."
    )
    depends_on: Annotated[list[Annotated[str, _text(checks.dependency)]], _BOUNDED] = Field(
        [], description="Jobs to run after, such as afterok:12; --depends adds to them."
    )
    notify: NotifySection | None = Field(
        None, description="Notifications of the job: recipients and events."
    )
    start_after: StartTime | None = Field(
        None, description="Not before: a time such as 2030-01-31T08:00Z, or a duration such as 2h."
    )
    start_before: StartTime | None = Field(
        None, description="Not after: a time, or a duration in which it must have started."
    )
    patience: Duration | None = Field(
        None,
        description="Wait for a lower price: 1.1 times the lowest is accepted at once, 2.1 times after this time.",
    )
    preferences: Annotated[
        list[Annotated[str, _text(checks.affinity)]], Field(max_length=MAX_PREFERENCES)
    ] = Field([], description="Preferred labels, in order of preference.")
    placement: Annotated[Placement, _choice(*Placement)] | None = Field(
        None, description="spread or pack the jobs of the customer over providers."
    )
    uses: Uses = Field([], description="Requirements on labels; another name of requirements.")
    requirements: Uses = Field(
        [], description="Labels that a provider must have, such as gpu.model=h100."
    )


class ModuleInputSection(Section):
    """An input of a module."""

    key: EnvName = Field(description="Name of the variable.")
    description: Annotated[str, _text(checks.text)] = Field("", description="Description.")
    default: EnvValue = Field("", description="Value without an argument.")


class ModuleOutputSection(Section):
    """An output of a module."""

    key: EnvName = Field(description="Name of the variable.")
    description: Annotated[str, _text(checks.text)] = Field("", description="Description.")


class MinimumResourcesSection(Section):
    """Minimum resources of a job that uses the module."""

    tasks: Count = Field(1, description="Processes.")
    cpus_per_task: Count = Field(1, description="CPU threads per task.")
    mem_per_cpu: Natural = Field(0, description="MB of memory per CPU.")
    gpus: Gpus = Field(0, description="GPUs of the whole job.")
    gpus_per_task: Gpus = Field(0, description="GPUs per task; replaced by gpus.")


class ModuleDocument(Section):
    """A module.yaml."""

    name: StepName = Field(description="Name of the module.")
    description: Annotated[str, _text(checks.text)] = Field("", description="Description.")
    minimum_resources: MinimumResourcesSection = Field(description="Minimum resources of the job.")
    inputs: Annotated[list[ModuleInputSection], _BOUNDED] = Field([], description="Inputs.")
    outputs: Annotated[list[ModuleOutputSection], _BOUNDED] = Field([], description="Outputs.")
    steps: Steps = Field(description="Steps of the module.")


for _model in (ForSection, LaunchSection, ModuleSection, UseSection, StepSection):
    _model.model_rebuild()
for _document in (Runnable, DefinitionDocument, JobFileDocument, ModuleDocument):
    _document.model_rebuild()


def job_file_schema() -> dict[str, Any]:
    """Return the JSON schema of job files, for editors."""
    schema = JobFileDocument.model_json_schema(by_alias=True)
    for key in ("commit", "module"):
        del schema["$defs"]["UseSection"]["properties"][key]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "DeepSquare job file",
    }
