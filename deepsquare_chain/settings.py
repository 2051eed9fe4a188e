"""Settings: flag > environment `DEEPSQUARE_*` > `.deepsquare.toml` > user config > default.

A context is a named set of values for a network, in a file; see `find_sources`.

Each program reads its settings once, when it starts, and passes them on as arguments.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from deepsquare_chain.errors import UsageError, number_problem
from deepsquare_chain.job import DAY
from deepsquare_chain.notification import is_url, parse_occasions, parse_targets

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENV_PREFIX: Final = "DEEPSQUARE_"
PROJECT_FILE: Final = ".deepsquare.toml"
MAX_FILE_BYTES: Final = 1_000_000
_FILE_HINT: Final = "Correct the file, or move it: every setting has a default."
_SCHEMES: Final = frozenset({"http", "https", "ws", "wss"})
# A URL may contain commas: only a comma before a scheme separates two URLs.
_BETWEEN_URLS: Final = re.compile(r"\s*,\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)")

_CONTEXT_LINE: Final = re.compile(r"^[ \t]*context[ \t]*=.*$", re.MULTILINE)
_FIRST_TABLE: Final = re.compile(r"^[ \t]*\[", re.MULTILINE)


def split_urls(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of URLs; keeps their order and removes duplicates."""
    return tuple(dict.fromkeys(_BETWEEN_URLS.split(text.strip())))


def safe_url(url: str) -> str:
    """Return one or more URLs without credentials, path and query, for logs and messages.

    The URLs of hosted endpoints contain their keys in any of these parts.
    """
    return ", ".join(_safe(url_part) for url_part in split_urls(url))


def format_setting(value: Any) -> str | None:
    """Format the value of a setting for output and logs; URLs are made safe by `safe_url`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return " ".join(f"{name}={format_setting(item)}" for name, item in value.items())
    text = str(value)
    if "://" not in text:
        return text
    links = [part.partition("=") for part in text.split()]
    if all("://" in url and "://" not in name for name, _, url in links):
        return " ".join(f"{name}={safe_url(url)}" for name, _, url in links)
    return safe_url(text)


def _safe(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "(unreadable URL)"
    host = f"[{host}]" if ":" in host else host
    netloc = host if port is None else f"{host}:{port}"
    hidden = "/..." if parts.path.strip("/") or parts.query else ""
    return urlunsplit((parts.scheme, netloc, hidden, "", ""))


def _check_url(url: str) -> str:
    if not is_url(url, _SCHEMES) or "," in (urlsplit(url).hostname or ""):
        raise ValueError("must be a URL such as http://127.0.0.1:8545")
    return url


def _check_socket(url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise ValueError("must be a URL such as ws://127.0.0.1:8545")
    return _check_url(url)


def _check_web(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("must be a URL such as https://relay.example.org")
    return _check_url(url).rstrip("/")


def _each(check: Callable[[str], str]) -> AfterValidator:
    """Check every URL of a list separated by commas."""
    return AfterValidator(lambda text: ",".join(map(check, split_urls(text))))


def _joined(value: Any) -> Any:
    """Join a list, from a file or repeated flags, to the text that a variable would have."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value


def _expand(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("must be a path without a NUL byte")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("must be a path; the user of this home folder is unknown") from None


def _options(value: Any) -> Any:
    """Convert KEY=VALUE texts, from flags or a variable, to a mapping; tables pass unchanged."""
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"must be KEY=VALUE pairs, separated by spaces: {error}") from None
    if not isinstance(value, list | tuple):
        return value
    pairs = [str(item).partition("=") for item in value]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError("must be KEY=VALUE pairs, separated by spaces")
    return {name: text for name, _, text in pairs}


FilePath = Annotated[Path, AfterValidator(_expand)]
OptionTable = Annotated[
    dict[str, str | bool | int | float | list[str]], NoDecode, BeforeValidator(_options)
]


def _check_mail_server(url: str) -> str:
    if not is_url(url, ("smtp", "smtps")):
        raise ValueError(
            "must be a mail server such as smtp://me@mail.example.org:587 or smtps://..."
        )
    if urlsplit(url).password is not None:
        raise ValueError("must not contain a password: use smtp_password_file")
    return url


Urls = Annotated[str, BeforeValidator(_joined), _each(_check_url)]
WebUrl = Annotated[str, AfterValidator(_check_web)]
WebUrls = Annotated[str, BeforeValidator(_joined), _each(_check_web)]
SocketUrl = Annotated[str, AfterValidator(_check_socket)]
NotifyTargets = Annotated[
    str, BeforeValidator(_joined), AfterValidator(lambda text: ",".join(parse_targets(text)))
]
NotifyOccasions = Annotated[
    str,
    BeforeValidator(_joined),
    AfterValidator(lambda text: ",".join(parse_occasions(text.split(",")))),
]
MailUrl = Annotated[str, AfterValidator(_check_mail_server)]


class Settings(BaseSettings):
    """The settings of all commands and daemons. Paths are relative to the file that sets them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True
    )

    context: str = Field(
        "", description="Name of a network: a table [contexts.NAME] of a settings file"
    )
    endpoint: Urls = Field(
        "http://127.0.0.1:8545",
        description="JSON-RPC endpoints of the chain: one, or several in order of preference",
    )
    websocket: SocketUrl | None = Field(
        None, description="ws:// address of a node that wakes services at each new block"
    )
    relay: WebUrl | None = Field(
        None,
        description="Relay that pays the gas of --gasless; by default that of the deployment record",
    )
    gateway: WebUrls | None = Field(
        None,
        description="Gateways of definitions, logs and results: one, or several in the order of "
        "preference; a devnet records its own",
    )
    max_lag_blocks: int = Field(
        5, ge=0, le=10_000, description="Blocks that an endpoint may lag behind the best one"
    )
    ca_file: FilePath | None = Field(
        None, description="Certificates (PEM) to trust in addition to the system's"
    )
    headers_file: FilePath | None = Field(
        None,
        description="File of HTTP headers for endpoints, such as API keys, readable only by its owner",
    )
    chain_id: int | None = Field(None, ge=1, description="Chain ID that the endpoint must serve")
    deployment: FilePath = Field(
        Path(".deepsquare/deployment.json"), description="Record of the deployed contracts"
    )
    keystore: FilePath | None = Field(None, description="Encrypted wallet file (keystore v3)")
    signer: str | None = Field(None, description="URL of an external signer; clef+URL for clef")
    signer_account: str | None = Field(
        None, description="Address of the signer's account, if it has several"
    )
    password_file: FilePath | None = Field(None, description="File with the password of the wallet")
    result_key: FilePath | None = Field(
        None, description="File of the age key that decrypts results; KEYSTORE.age-key by default"
    )
    store: FilePath = Field(Path(".deepsquare/definitions"), description="Folder of definitions")
    state_dir: FilePath = Field(
        Path(".deepsquare"), description="Folder of databases, logs and runs"
    )
    confirmations: int = Field(
        1, ge=0, le=10_000, description="Confirmations before the state of a block is used"
    )
    poll_interval: float = Field(
        1.0, gt=0, le=3_600, description="Poll interval of the chain in seconds"
    )
    timeout: float = Field(60.0, gt=0, le=DAY, description="Seconds to wait for a receipt")
    max_fee_gwei: float = Field(
        500.0, gt=0, le=1_000_000_000, description="Maximum fee per gas, in gwei"
    )
    max_answer_fee_gwei: float = Field(
        5_000.0,
        gt=0,
        le=1_000_000_000,
        description="Maximum fee per gas while a provider has a challenge to answer, in gwei",
    )
    collect_interval: int | None = Field(
        None,
        ge=0,
        le=31_536_000,
        description="Seconds between a run's interim payments; by default that of the grid, 0 for none",
    )
    collect_gas_share: float = Field(
        0.05, gt=0, le=1, description="Largest share of an interim payment that its gas may cost"
    )
    coin_value: float = Field(
        1.0,
        ge=0,
        le=1_000_000_000,
        description="Credits that one coin of the chain is worth, to compare gas with payments",
    )
    unbilled_warning: float = Field(
        100.0,
        ge=0,
        le=1_000_000_000,
        description="Unbilled credits of one run above which its provider is warned; 0 for never",
    )
    health_port: int | None = Field(
        None, ge=0, le=65_535, description="Port on 127.0.0.1 of a service's health and metrics"
    )
    follow_offer: bool = Field(
        False,
        description="Keep a provider's offer at the capacity that its cluster's other users leave free",
    )
    publish_abilities: bool = Field(
        True,
        description="Test what jobs can use at a provider, and publish it as labels (ability.*)",
    )
    disk_floor: int = Field(
        256,
        ge=1,
        le=1_000_000_000,
        description="MB of free disk below which a provider claims no job",
    )
    keep_runs_days: float = Field(
        14.0,
        gt=0,
        le=36_500,
        description="Days for which a provider keeps the folders of ended jobs; at least one hour",
    )
    keep_runs_mb: int = Field(
        0,
        ge=0,
        le=1_000_000_000_000,
        description="Maximum MB of disk for these folders; the oldest are removed first; 0 for no limit",
    )
    executor: str = Field(
        "local",
        description="Executor that runs a provider's jobs: local, slurm, or another installed one",
    )
    executor_options: OptionTable = Field(
        default_factory=dict,
        description="Options of the executor: a table in a file, otherwise KEY=VALUE pairs separated by spaces",
    )
    gateway_options: OptionTable = Field(
        default_factory=dict,
        description="Options of `gateway serve`: a table in a file, else KEY=VALUE by spaces",
    )
    relay_options: OptionTable = Field(
        default_factory=dict,
        description="Options of `relay serve`: a table in a file, else KEY=VALUE by spaces",
    )
    allow_unisolated: bool = Field(
        False, description="Run jobs without isolation from the provider's daemon"
    )
    allow_root: bool = Field(False, description="Run a provider's daemon and its jobs as root")
    explorer_database: str = Field(
        "", description="File or postgresql+psycopg:// URL of the explorer's database"
    )
    explorer_links: str = Field(
        "",
        description="Other explorers to link to, separated by spaces: NAME.tx=https://.../{} (or address, block)",
    )
    notify_to: NotifyTargets = Field(
        "", description="E-mail addresses and webhooks that are notified of every job of the wallet"
    )
    notify_on: NotifyOccasions = Field(
        "end",
        description="Events to notify of: begin, end, fail, requeue, all; separated by commas",
    )
    notify_by: Literal["run", "gateway"] = Field(
        "run", description="Who sends notifications: `deepsquare notify run`, or the first gateway"
    )
    notify_desktop: bool = Field(
        False, description="Show notifications on this machine's desktop too (notify-send)"
    )
    notify_key_file: FilePath | None = Field(
        None, description="File of the key that signs webhooks, readable only by its owner"
    )
    smtp: MailUrl | None = Field(
        None, description="Mail server of notifications: smtp://USER@HOST:587 or smtps://USER@HOST"
    )
    smtp_from: str = Field(
        "", description="Sender of e-mail; by default the user of the mail server"
    )
    smtp_password_file: FilePath | None = Field(
        None, description="File of the mail server's password, readable only by its owner"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of a service's log lines"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="json, console, or auto: console on a terminal"
    )

    @property
    def result_key_file(self) -> Path:
        """Path of the age key that decrypts results; the file may not exist."""
        if self.result_key is not None:
            return self.result_key
        if self.keystore is not None:
            return self.keystore.with_name(f"{self.keystore.name}.age-key")
        return self.state_dir / "results.age-key"

    @property
    def private_paths(self) -> tuple[Path, ...]:
        """Files and folders hidden from jobs: keys, passwords, state, other jobs' definitions."""
        paths = [self.keystore, self.password_file, self.result_key_file, self.headers_file]
        paths += [self.state_dir, self.store, self.notify_key_file, self.smtp_password_file]
        return tuple(Path(os.path.abspath(path)) for path in paths if path is not None)


def user_config_path(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the path of the user's configuration file; the file may not exist.

    None if the user has no home directory: neither HOME nor an entry in the user database, as in
    many containers.
    """
    env = os.environ if environ is None else environ
    base = env.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        return Path(base).expanduser() / "deepsquare" / "config.toml"
    except RuntimeError:
        return None


@dataclass(frozen=True, slots=True)
class Layer:
    """Values of one source below the environment; `origin` is its name in messages."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of the settings: the values of the command line, then layers, highest first.

    `contexts` maps the name of each known context to its endpoint, or to an empty text.
    """

    given: Mapping[str, Any]
    layers: tuple[Layer, ...]
    context: str
    contexts: Mapping[str, str]

    def origin(self, name: str) -> str:
        """Return the name of the source that gives the effective value of a setting."""
        if name in self.given:
            return "the command line"
        variable = _variable(name)
        if variable:
            return f"the environment ({variable})"
        return next((layer.origin for layer in self.layers if name in layer.values), "the defaults")


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    project_dir: Path | None = None,
    user_config: Path | None = None,
) -> Settings:
    """Read all layers; for arguments and further errors, see `find_sources`.

    Raises:
        UsageError: A value is invalid; the message names the setting and the layer.
    """
    return resolve(find_sources(flags, project_dir=project_dir, user_config=user_config))


def find_sources(
    flags: Mapping[str, Any] | None = None,
    *,
    project_dir: Path | None = None,
    user_config: Path | None = None,
) -> Sources:
    """Read the files and choose the context.

    A context chosen by flag or environment takes precedence over the plain values of both files.
    A context chosen by a file takes precedence over that file's own values.

    Args:
        flags: Values given on the command line; None means that a flag was not given.
        project_dir: Folder that may hold `.deepsquare.toml`; the working folder by default.
        user_config: The user's configuration; `~/.config/deepsquare/config.toml` by default.

    Raises:
        UsageError: A file can't be read or has an unknown key, or the context does not exist.
    """
    flag_values = {
        key: value for key, value in (flags or {}).items() if value not in (None, [], ())
    }
    _refuse_unknown(flag_values, "the command line")
    project = (project_dir or Path.cwd()) / PROJECT_FILE
    paths = (project, user_config or user_config_path())
    files = [_read_file(path) for path in paths if path is not None]
    layers = [Layer(str(file.path), file.values) for file in files]
    chosen, position, origin = _chosen_context(flag_values, files)
    if chosen:
        layers[position:position] = _context_layers(chosen, files, origin)
    contexts: dict[str, str] = dict.fromkeys(READY_CONTEXTS, "")
    for file in reversed(files):
        for name, values in file.contexts.items():
            contexts[name] = str(values.get("endpoint", contexts.get(name, "")))
    return Sources(flag_values, tuple(layers), chosen, contexts)


def resolve(sources: Sources) -> Settings:
    """Return the effective settings.

    Raises:
        UsageError: A value is invalid; the message names the setting and the layer.
    """

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            lower = [
                InitSettingsSource(settings_cls, dict(layer.values)) for layer in sources.layers
            ]
            return init_settings, env_settings, *lower

    try:
        return Layered(**sources.given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UsageError(
            f"Setting {name} of {sources.origin(name)}: {_reason(name, first)}",
            hint=f"Correct it there, or give --{name.replace('_', '-')}.",
        ) from None


def _reason(name: str, error: ErrorDetails) -> str:
    """Return what is wrong with the value of a setting, and what is allowed."""
    field = Settings.model_fields[name]
    kinds = {field.annotation, *get_args(field.annotation)} & {int, float}
    if not kinds:
        given = repr(str(error["input"]).strip()[:80])
        match error["type"]:
            case "bool_parsing" | "bool_type":
                return f"{given} is neither true nor false"
            case "literal_error":
                return f"{given} is not one of {error['ctx']['expected']}"
            case "path_type" | "string_type":
                return f"{given} is not text in quotes"
            case _:
                return error["msg"].removeprefix("Value error, ")
    limits = {key: getattr(item, key) for item in field.metadata for key in item.__slots__}
    return number_problem(
        error["input"],
        whole=int in kinds,
        low=limits.get("ge"),
        high=limits.get("le"),
        above=limits.get("gt"),
        example=field.default,
    )


def _links(explorer: str) -> str:
    """Return the links of an explorer with the URL paths of Etherscan."""
    return " ".join(
        f"explorer.{kind}={explorer}/{kind}/{{}}" for kind in ("tx", "address", "block")
    )


#: Built-in contexts of public test networks; each still needs an endpoint and the record of a
#: deployment. The poll interval is about the block time.
READY_CONTEXTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sepolia": {
        "chain_id": 11_155_111,
        "confirmations": 3,
        "poll_interval": 12.0,
        "timeout": 300.0,
        "explorer_links": _links("https://sepolia.etherscan.io"),
    },
    "base-sepolia": {
        "chain_id": 84_532,
        "confirmations": 5,
        "poll_interval": 2.0,
        "explorer_links": _links("https://sepolia.basescan.org"),
    },
    "arbitrum-sepolia": {
        "chain_id": 421_614,
        "confirmations": 10,
        "poll_interval": 1.0,
        "explorer_links": _links("https://sepolia.arbiscan.io"),
    },
}


def _variable(name: str) -> str:
    """Return the name of the environment variable of a setting, or empty if it is not set."""
    variable = f"{ENV_PREFIX}{name}".upper()
    return next((key for key, value in os.environ.items() if key.upper() == variable and value), "")


@dataclass(frozen=True, slots=True)
class _File:
    """A configuration file: its own values, and the values of its contexts by name."""

    path: Path
    values: Mapping[str, Any]
    contexts: Mapping[str, Mapping[str, Any]]


def _chosen_context(given: Mapping[str, Any], files: Sequence[_File]) -> tuple[str, int, str]:
    """Return the context's name (or empty), the number of layers above it, and the source."""
    if "context" in given:
        return str(given["context"]), 0, "the command line"
    if variable := _variable("context"):
        return os.environ[variable], 0, f"the environment ({variable})"
    for position, file in enumerate(files):
        if file.values.get("context"):
            return str(file.values["context"]), position, str(file.path)
    return "", 0, ""


def _context_layers(name: str, files: Sequence[_File], origin: str) -> list[Layer]:
    layers = [
        Layer(f"context {name} of {file.path}", file.contexts[name])
        for file in files
        if name in file.contexts
    ]
    if name in READY_CONTEXTS:
        layers.append(Layer(f"context {name} of this program", READY_CONTEXTS[name]))
    if not layers:
        known = sorted({*READY_CONTEXTS, *(name for file in files for name in file.contexts)})
        raise UsageError(
            f"There is no context {name[:60]!r}, which is set by {origin}",
            hint=f"Contexts: {', '.join(known)}; or write a table "
            f"[contexts.{name[:60] if name.isprintable() else 'NAME'}] into "
            f"{' or '.join(str(file.path) for file in files)}.",
        )
    return layers


def _read_file(path: Path) -> _File:
    """Read a configuration file and resolve its paths against its folder; empty without a file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return _File(path, {}, {})
    except OSError as error:
        if not os.path.lexists(path):  # HOME belongs to another user, as in many containers
            return _File(path, {}, {})
        raise UsageError(f"{path} can't be read: {error.strerror}", hint=_FILE_HINT) from None
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes", hint=_FILE_HINT)
    try:
        values = tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint=_FILE_HINT) from None
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not valid TOML: {str(error)[:200]!r}", hint=_FILE_HINT
        ) from None
    contexts = values.pop("contexts", {})
    if not isinstance(contexts, dict) or not all(isinstance(e, dict) for e in contexts.values()):
        raise UsageError(
            f"{path}: contexts must be tables", hint="Write [contexts.NAME] and settings below it."
        )
    return _File(
        path,
        _anchored(values, path, str(path)),
        {
            name: _anchored(context, path, f"context {name[:60]!r} of {path}")
            for name, context in contexts.items()
        },
    )


def _anchored(values: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    _refuse_unknown(values, where)
    return {key: _anchor(key, value, path.parent) for key, value in values.items()}


def _anchor(key: str, value: Any, folder: Path) -> Any:
    if key in _PATHS and isinstance(value, str) and value and "://" not in value:
        with suppress(RuntimeError):  # no home directory: `_expand` reports it
            return str(folder / Path(value).expanduser())
    return value


#: Settings whose value in a file may be a path relative to its folder.
_PATHS: Final = {"explorer_database"} | {
    name
    for name, field in Settings.model_fields.items()
    if field.annotation is Path or FilePath in get_args(field.annotation)
}


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in Settings.model_fields or (key == "context" and where.startswith("context ")):
            close = difflib.get_close_matches(key, Settings.model_fields, n=1)
            raise UsageError(
                f"{where} has an unknown setting {key[:60]!r}",
                hint=f"Did you mean {close[0]}?" if close else "See `deepsquare config show`.",
            )


def choose_context(path: Path, name: str) -> None:
    """Set `context = "NAME"` in a configuration file, created if missing; nothing else changes.

    Raises:
        UsageError: The file can't be read or written, or can't be edited safely.
    """
    try:
        before = path.read_text("utf-8-sig") if path.exists() else ""
        after = _with_context(before, name)
        safe = tomllib.loads(after) == tomllib.loads(before) | {"context": name}
        reason = "its format is not supported"
        if safe:
            _replace_file(path, after)
    except (OSError, ValueError) as error:
        safe, reason = False, getattr(error, "strerror", None) or str(error)
    if not safe:
        raise UsageError(
            f"{path} can't be changed: {reason[:200]}",
            hint=f'Write the line context = "{name}" into the file by hand, above all tables.',
        )


def _with_context(text: str, name: str) -> str:
    """Return the text with the context set above its first table."""
    table = _FIRST_TABLE.search(text)
    end = table.start() if table else len(text)
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    line = f'context = "{quoted}"'
    head, replacements = _CONTEXT_LINE.subn(lambda _: line, text[:end], count=1)
    return (head if replacements else f"{line}\n{head}") + text[end:]


def _replace_file(path: Path, text: str) -> None:
    """Replace the file atomically; file mode and symbolic links are kept."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o600)
    temporary.replace(path)
