"""Registration of a provider: warnings before it, and the files of its machine.

The warnings are also given before changes of prices or labels. The files are the configuration, a
systemd unit, alerts and a dashboard.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import psutil
from pydantic_core import PydanticUndefined

from deepsquare_chain.credits import CREDIT, format_credits, hourly
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import HOUR, MEGABYTE, Hardware, Prices, Provider
from deepsquare_chain.settings import PROJECT_FILE, Settings

#: Maximum price of a CPU, a GPU or a MB, in credit-wei per second: `MAX_PRICE` of the contract.
MAX_PRICE: Final = 10 * CREDIT
#: A price change by this factor needs a confirmation: it is usually a wrong unit.
_FACTOR: Final = 10
_NAMES: Final = (("cpu", "CPU"), ("gpu", "GPU"), ("mem", "MB of memory"))
#: Fields of `Hardware`, and their names for display.
_HARDWARE_FIELDS: Final = (
    ("nodes", "nodes"),
    ("cpus_per_node", "CPUs per node"),
    ("mem_per_node", "MB per node"),
    ("gpus_per_node", "GPUs per node"),
)

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


def price_per_second(credits_per_hour: int, text: str) -> int:
    """Convert a price in credit-wei per hour to credit-wei per second, rounded down.

    Raises:
        ValueError: The price is above the contract's maximum, or would be rounded to zero.
    """
    price = credits_per_hour // HOUR
    if price > MAX_PRICE:
        raise ValueError(
            f"{text[:80]} credits per hour is more than the maximum price, {hourly(MAX_PRICE)}; "
            "a price is for one CPU, GPU or MB, per hour"
        )
    if credits_per_hour and not price:
        raise ValueError(
            f"{text[:80]} credits per hour is less than the minimum price, {hourly(1)}, and "
            "would be free"
        )
    return price


def price_changes(now: Prices, wanted: Prices, *, large: bool) -> Iterator[str]:
    """Yield a sentence about each changed price; the first price after zero is no change.

    `large` selects prices that become zero or change so much that it may be a mistake; otherwise
    the other changes are yielded.
    """
    for name, word in _NAMES:
        before, after = getattr(now, name), getattr(wanted, name)
        if before == after or not before:
            continue
        words = f"The price per {word} goes from {_format_price(before)} to {_format_price(after)} credits per hour"
        is_large = not after or max(before, after) >= _FACTOR * min(before, after)
        if is_large is not large:
            continue
        if not after:
            words += ": it would be free"
        elif is_large:
            words += f", {_ratio_text(before, after)}"
        yield f"{words}."


def price_warnings(wanted: Prices) -> Iterator[str]:
    """Yield warnings about prices that seem to be in a wrong unit."""
    if wanted.mem and wanted.mem >= wanted.cpu:
        yield (
            f"A MB of memory would cost {_format_price(wanted.mem)} credits per hour, and a CPU "
            f"{_format_price(wanted.cpu)}: check that it is not the price of a GB."
        )
    if not (wanted.cpu or wanted.gpu or wanted.mem):
        yield "All prices would be zero, and a provider without a price gets no jobs."


def free_gpus(hardware: Hardware, prices: Prices) -> Iterator[str]:
    """Yield a warning if GPUs have no price."""
    if hardware.gpus_per_node and not prices.gpu:
        yield "GPUs are registered without a price, and would be free: set --gpu-price."


def price_example(prices: Prices) -> str:
    """Return an example of the hourly price of typical jobs."""
    cpu_job = prices.cpu + 2_000 * prices.mem
    words = f"A job of 1 CPU and 2,000 MB pays {_format_price(cpu_job)} credits per hour"
    if prices.gpu:
        words += f", with a GPU {_format_price(cpu_job + prices.gpu)}"
    return f"{words}."


def label_changes(now: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    """Yield warnings about labels that are removed or changed."""
    for key, value in sorted(now.items()):
        if key not in wanted:
            yield f"The label {key}={value} is removed."
        elif wanted[key] != value:
            yield f"The label {key}={value} becomes {key}={wanted[key]}."


def hardware_changes(provider: Provider, wanted: Hardware) -> Iterator[str]:
    """Yield warnings about hardware that is reduced."""
    now = provider.hardware
    for name, word in _HARDWARE_FIELDS:
        before, after = getattr(now, name), getattr(wanted, name)
        if after < before:
            yield f"The {word} go from {before} to {after}."


def hardware_warnings(
    wanted: Hardware, detected_hardware: Hardware, machine_name: str
) -> Iterator[str]:
    """Yield warnings about hardware that would be registered but does not exist.

    `machine_name` is the place of detection, such as "this machine".
    """
    for name, word in _HARDWARE_FIELDS:
        registered, detected = getattr(wanted, name), getattr(detected_hardware, name)
        if registered > detected:
            yield f"{registered} {word} would be registered, but {machine_name} has {detected}."


def machine() -> Hardware:
    """Return the hardware of this machine as one node; memory in MB."""
    return Hardware(
        nodes=1,
        cpus_per_node=os.cpu_count() or 1,
        mem_per_node=psutil.virtual_memory().total // MEGABYTE,
        gpus_per_node=_gpus(Path("/dev")),
    )


def check_labels(labels: list[tuple[str, str]]) -> dict[str, str]:
    """Return labels by key.

    Raises:
        UsageError: A key is given twice with different values.
    """
    value_by_key: dict[str, str] = {}
    for key, value in labels:
        if value_by_key.setdefault(key, value) != value:
            raise UsageError(
                f"The label {key} is given twice, as {value_by_key[key]} and {value}",
                hint="Give each key once.",
            )
    return value_by_key


def _gpus(devices: Path) -> int:
    """Return the number of GPUs with a device file; AMD GPUs count only if their driver is loaded."""
    nvidia = len([path for path in devices.glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    amd = len(list((devices / "dri").glob("renderD*"))) if (devices / "kfd").exists() else 0
    return nvidia + amd


def _ratio_text(before: int, after: int) -> str:
    larger, smaller = max(before, after), min(before, after)
    return f"{larger // smaller:,} times {'more' if after > before else 'less'}"


def _format_price(per_second: int) -> str:
    """Format credits per hour with six decimal places, or exactly if that would be zero."""
    exact = per_second * HOUR
    unit = CREDIT // 1_000_000
    rounded = round(exact / unit) * unit
    return format_credits(rounded or exact)


def write_provider_files(folder: Path, executor: str) -> list[Path]:
    """Write the files of a new provider; if one of them exists, nothing is written.

    `folder` is where the daemon will be started; it is created if it is missing.

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
