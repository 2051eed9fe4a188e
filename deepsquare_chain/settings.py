"""Settings: flag > environment `DEEPSQUARE_*` > `.deepsquare.toml` > user config > default.

They are read once at the edge of a program and passed in; nothing reads them from a global.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from deepsquare_chain.errors import UsageError

ENV_PREFIX: Final = "DEEPSQUARE_"
PROJECT_FILE: Final = ".deepsquare.toml"
MAX_FILE_BYTES: Final = 1_000_000
_SCHEMES: Final = frozenset({"http", "https", "ws", "wss"})
# A comma may also stand within a URL: only one before a scheme parts two.
_BETWEEN_URLS: Final = re.compile(r"\s*,\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)")


def split_urls(text: str) -> tuple[str, ...]:
    """The URLs of a setting that takes several, parted by commas; in their order, each once."""
    return tuple(dict.fromkeys(_BETWEEN_URLS.split(text.strip())))


def safe_url(url: str) -> str:
    """The URL (or several) as logs and messages may show it: no credentials, path or query.

    Hosted endpoints carry their keys in any of those.
    """
    return ", ".join(_safe(each) for each in split_urls(url))


def _safe(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "(unreadable URL)"
    host = f"[{host}]" if ":" in host else host
    place = host if port is None else f"{host}:{port}"
    hidden = "/..." if parts.path.strip("/") or parts.query else ""
    return urlunsplit((parts.scheme, place, hidden, "", ""))


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ","
        usable = parts.scheme in _SCHEMES and "," not in host and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be a URL such as http://127.0.0.1:8545")
    return url


def _check_urls(text: str) -> str:
    return ",".join(_check_url(each) for each in split_urls(text))


def _check_socket(url: str) -> str:
    if not url.startswith(("ws://", "wss://")):
        raise ValueError("must be a URL such as ws://127.0.0.1:8545")
    return _check_url(url)


def _joined(value: Any) -> Any:
    """A list, as files and repeated flags give it, as the text that a variable would hold."""
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return ",".join(value)
    return value


FilePath = Annotated[Path, AfterValidator(Path.expanduser)]
Urls = Annotated[str, BeforeValidator(_joined), AfterValidator(_check_urls)]
SocketUrl = Annotated[str, AfterValidator(_check_socket)]


class Settings(BaseSettings):
    """What every command and daemon may be told. Paths are relative to where they are written."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True
    )

    endpoint: Urls = Field(
        "http://127.0.0.1:8545",
        description="JSON-RPC endpoints of the chain: one, or several in the order of preference",
    )
    websocket: SocketUrl | None = Field(
        None, description="ws:// address of a node that wakes services at each new block"
    )
    max_lag_blocks: int = Field(
        5, ge=0, le=10_000, description="Blocks that an endpoint may be behind the best one"
    )
    chain_id: int | None = Field(None, ge=1, description="Chain id that the endpoint must have")
    deployment: FilePath = Field(
        Path(".deepsquare/deployment.json"), description="Record of the deployed contracts"
    )
    keystore: FilePath | None = Field(None, description="Encrypted wallet file (keystore v3)")
    password_file: FilePath | None = Field(None, description="File that holds its password")
    store: FilePath = Field(Path(".deepsquare/definitions"), description="Folder of definitions")
    state_dir: FilePath = Field(Path(".deepsquare"), description="Databases, logs and runs")
    confirmations: int = Field(1, ge=0, le=10_000, description="Blocks before a fact is believed")
    poll_interval: float = Field(
        1.0, gt=0, le=3_600, description="Seconds between two looks at the chain"
    )
    timeout: float = Field(60.0, gt=0, le=86_400, description="Seconds to wait for a receipt")
    max_fee_gwei: float = Field(
        500.0, gt=0, le=1_000_000_000, description="Ceiling of the fee per gas, in gwei"
    )
    health_port: int | None = Field(
        None, ge=0, le=65_535, description="Port on 127.0.0.1 of a service's health and figures"
    )
    explorer_database: str = Field(
        "", description="File or postgresql+psycopg:// URL of the explorer's index"
    )
    explorer_links: str = Field(
        "",
        description="Other explorers to link to, by spaces: NAME.tx=https://.../{} (address, block)",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"


def user_config_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the user's own configuration stands, whether it exists or not."""
    env = os.environ if environ is None else environ
    base = env.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "deepsquare" / "config.toml"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    project_dir: Path | None = None,
    user_config: Path | None = None,
) -> Settings:
    """Read all layers.

    Args:
        flags: Values given on the command line; None means that a flag was not given.
        project_dir: Folder that may hold `.deepsquare.toml`; the working folder by default.
        user_config: The user's configuration; `~/.config/deepsquare/config.toml` by default.

    Raises:
        UsageError: A layer can't be read, has an unknown key, or a value is wrong; the message
            names the setting and the layer.
    """
    given = {key: value for key, value in (flags or {}).items() if value not in (None, [], ())}
    _refuse_unknown(given, "the command line")
    project = (project_dir or Path.cwd()) / PROJECT_FILE
    layers = [(path, _read_layer(path)) for path in (project, user_config or user_config_path())]

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
            files = [InitSettingsSource(settings_cls, dict(values)) for _, values in layers]
            return init_settings, env_settings, *files

    try:
        return Layered(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"Setting {name} of {_origin(name, given, layers)}: {reason}",
            hint=f"Correct it there, or give --{name.replace('_', '-')}.",
        ) from None


def _origin(name: str, given: Mapping[str, Any], layers: list[tuple[Path, dict[str, Any]]]) -> str:
    if name in given:
        return "the command line"
    for variable, value in os.environ.items():
        if variable.upper() == f"{ENV_PREFIX}{name}".upper() and value:
            return f"the environment ({variable})"
    return next((str(path) for path, values in layers if name in values), "the defaults")


def _read_layer(path: Path) -> dict[str, Any]:
    """Values of a configuration file, paths made relative to its folder; empty without a file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
    try:
        values = tomllib.loads(raw.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    _refuse_unknown(values, str(path))
    return {key: _anchor(key, value, path.parent) for key, value in values.items()}


def _anchor(key: str, value: Any, folder: Path) -> Any:
    if key in _PATHS and isinstance(value, str) and value and "://" not in value:
        return str(folder / Path(value).expanduser())
    return value


_PATHS: Final = frozenset(
    {"deployment", "explorer_database", "keystore", "password_file", "state_dir", "store"}
)


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in Settings.model_fields:
            close = difflib.get_close_matches(key, Settings.model_fields, n=1)
            raise UsageError(
                f"{where} has an unknown setting {key[:60]!r}",
                hint=f"Did you mean {close[0]}?" if close else "See `deepsquare config show`.",
            )
