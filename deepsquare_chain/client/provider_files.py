"""Writes the files of a new provider: configuration, systemd unit, alerts and dashboard."""

from __future__ import annotations

import getpass
import json
import os
import sys
import textwrap
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic_core import PydanticUndefined

from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import PROJECT_FILE, Settings

#: Settings by section, in the order of the file.
_SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "The chain": (
        *("endpoint", "chain_id", "deployment", "websocket", "max_lag_blocks", "confirmations"),
        *("poll_interval", "ca_file", "headers_file"),
    ),
    "The provider's wallet": ("keystore", "password_file"),
    "Files": ("state_dir", "store", "disk_floor", "keep_runs_days", "keep_runs_mb"),
    "Gas": ("max_fee_gwei", "max_answer_fee_gwei", "timeout"),
    "Interim payments of long jobs": (
        *("collect_interval", "collect_gas_share", "coin_value", "unbilled_warning"),
    ),
    "Monitoring": ("health_port", "log_level", "log_format"),
    "Executor": (
        *("executor", "follow_offer", "publish_abilities", "allow_unisolated", "allow_root"),
    ),
}
#: Settings that a provider never needs.
_OTHERS: Final = frozenset(
    {
        *("context", "relay", "result_key", "explorer_database", "explorer_links"),
        *("gateway_options", "relay_options"),
        *("notify_to", "notify_on", "notify_by", "notify_desktop", "notify_key_file"),
        *("smtp", "smtp_from", "smtp_password_file"),
    }
)
#: A TOML table, which must be last in the file.
_OPTIONS_TABLE: Final = "executor_options"
#: Settings that are not commented out, because every provider needs them.
_REQUIRED: Final[Mapping[str, Any]] = {
    "endpoint": "http://127.0.0.1:8545",
    "deployment": "deployment.json",
    "keystore": "provider.json",
    "password_file": "password",
    "state_dir": "state",
    "health_port": 9464,
}
#: Examples for settings without a default.
_EXAMPLES: Final[Mapping[str, Any]] = {
    "chain_id": 31337,
    "websocket": "ws://127.0.0.1:8546",
    "ca_file": "ca.pem",
    "headers_file": "headers.toml",
    "collect_interval": 3600,
    "gateway": "https://gateway.example.org",
    "signer": "http://127.0.0.1:9000",
    "signer_account": "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
}
_HEADER: Final = """\
# Settings of a DeepSquare provider. The daemon reads this file when it is started in this folder.
# A commented line shows the default, or an example for a setting without a default.
# A flag (--state-dir) overrides a variable (DEEPSQUARE_STATE_DIR), which overrides this file.
# `deepsquare config show` prints the effective settings, `deepsquare provider doctor` checks them.
"""
_FOOTER: Final = """
# Options of the executor; see docs/provider.md and docs/isolation.md. For Slurm:
[executor_options]
# namespaces = true                           # containers and networks of steps in the sandbox
# partitions = ["batch"]
# account = "grid"
"""


def write_provider_files(folder: Path, executor: str) -> list[Path]:
    """Write the files of a new provider; if one of them exists, nothing is written.

    Args:
        folder: Folder from which the daemon will be started; created if missing.
        executor: Name of the executor.

    Returns:
        Paths of the files.

    Raises:
        UsageError: One of the files exists, or can't be written.
    """
    texts = provider_files(folder.absolute(), executor)
    paths = [folder / name for name in texts]
    existing = [path for path in paths if os.path.lexists(path)]
    if existing:
        raise UsageError(
            f"{existing[0]} already exists, so that nothing was written",
            hint="Choose another folder, or move the file first.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} can't be written: {error.strerror}",
            hint="Choose a writable folder.",
        ) from None
    return paths


def provider_files(folder: Path, executor: str) -> dict[str, str]:
    """Return file contents by name, for a daemon in `folder` with the current user and Python."""
    shipped = files("deepsquare_chain.client") / "operations"
    values = {
        "@USER@": _user(),
        "@FOLDER@": str(folder),
        "@PROGRAM@": str(Path(sys.executable).with_name("deepsquare")),
        "@PREFIX@": sys.prefix,
    }
    texts = {PROJECT_FILE: configuration(executor)}
    for name in ("deepsquare-provider.service", "hardened.conf", "alerts.yml", "dashboard.json"):
        text = (shipped / name).read_text("utf-8")
        for placeholder, value in values.items():
            # Spaces and percent signs have a special meaning in unit files.
            text = text.replace(placeholder, value.replace("%", "%%").replace(" ", "\\x20"))
        texts[name] = text
    return texts


def configuration(executor: str) -> str:
    """Return a configuration file that explains every setting of a provider."""
    lines = [_HEADER]
    listed = {name for names in _SECTIONS.values() for name in names}
    sections = dict(_SECTIONS)
    # New settings without a section must still appear in the file.
    rest = [
        name for name in Settings.model_fields if name not in listed | _OTHERS | {_OPTIONS_TABLE}
    ]
    if rest:
        sections["Other settings"] = tuple(rest)
    values = {**_REQUIRED, "executor": executor}
    for title, names in sections.items():
        lines.append(f"\n# ---- {title}\n")
        for name in names:
            lines.extend(_lines(name, values))
    return "\n".join(lines) + _FOOTER


def _lines(name: str, values: Mapping[str, Any]) -> list[str]:
    field = Settings.model_fields[name]
    default = None if field.default is PydanticUndefined else field.default
    comment = textwrap.wrap(f"{field.description}.", 96)
    lines = [f"# {line}" for line in comment]
    if name in values:
        return [*lines, f"{name} = {_toml(values[name])}", ""]
    shown_value = _EXAMPLES.get(name) if default is None else default
    return [*lines, f"# {name} = {_toml('' if shown_value is None else shown_value)}", ""]


def _toml(value: Any) -> str:
    """Format a value as TOML; JSON has the same format for numbers, booleans and strings."""
    return json.dumps(value if isinstance(value, bool | int | float) else str(value))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in many containers
        return str(os.getuid())
