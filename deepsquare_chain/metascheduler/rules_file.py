"""Reads the rules of a meta-scheduler, and other files of operators, from YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import yaml
from eth_utils.address import to_checksum_address
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import DAY
from deepsquare_chain.metascheduler.policy import Rules, Weights

_MAX_BYTES: Final = 1_000_000
_HINT: Final = "examples/rules.yaml shows every rule with its default."
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_DEFAULTS: Final = Rules()
_Model = TypeVar("_Model", bound=BaseModel)

_Weight = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
_Factor = Annotated[float, Field(ge=0.001, le=1_000, allow_inf_nan=False)]


class _Weights(BaseModel):
    model_config = ConfigDict(extra="forbid")

    cost: _Weight = _DEFAULTS.weights.cost
    time: _Weight = _DEFAULTS.weights.time
    energy: _Weight = _DEFAULTS.weights.energy
    leave_frugal: float = Field(_DEFAULTS.weights.leave_frugal, ge=0, le=10, allow_inf_nan=False)


class _RulesFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    overdue_after: int = Field(_DEFAULTS.overdue_after, ge=0, le=10**8)
    overdue_factor: int = Field(_DEFAULTS.overdue_factor, ge=0, le=10**6)
    reservations: int = Field(_DEFAULTS.reservations, ge=0, le=1_000)
    overdue_reservations: int = Field(_DEFAULTS.overdue_reservations, ge=1, le=1_000)
    start_margin: int = Field(_DEFAULTS.start_margin, ge=0, le=DAY)
    weights: _Weights = Field(default_factory=_Weights)
    fair_share: float = Field(_DEFAULTS.fair_share, ge=0, le=10, allow_inf_nan=False)
    priorities: dict[str, _Factor] = Field(default_factory=dict, max_length=100_000)
    max_running: int = Field(_DEFAULTS.max_running, ge=0, le=10**9)
    energy_hold: float = Field(_DEFAULTS.energy_hold, ge=0, le=1_000, allow_inf_nan=False)
    frugal_within: float = Field(_DEFAULTS.frugal_within, ge=1, le=1_000, allow_inf_nan=False)
    longest_hold: int = Field(_DEFAULTS.longest_hold, ge=0, le=10**8)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, document: Any) -> Any:
        """Treat an empty file as all defaults."""
        return {} if document is None else document


def read_rules(path: Path) -> Rules:
    """Read rules. Keys that the file omits have their defaults.

    Raises:
        UsageError: The file can't be read or is invalid; the message names the error.
    """
    rules_file = read_yaml(path, _RulesFile, content="The rules", hint=_HINT)
    values = rules_file.model_dump()
    values["weights"] = Weights(**values["weights"])
    values["priorities"] = {
        _customer(name): factor for name, factor in rules_file.priorities.items()
    }
    return Rules(**values)


def read_yaml(path: Path, model: type[_Model], *, content: str, hint: str) -> _Model:
    """Read a YAML file of at most a megabyte; messages name its `content` and give the `hint`.

    Raises:
        UsageError: The file can't be read or is invalid; the message names the error.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise UsageError(f"{content} {path}: more than {_MAX_BYTES} bytes", hint=hint)
        document: Any = yaml.safe_load(text.decode())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(
            f"{content} {path} can't be read: {str(error)[:300]}", hint=hint
        ) from error
    try:
        return model.model_validate(document)
    except ValidationError as error:
        # A misspelled key also causes a missing one, and is the better name of the mistake.
        first_error = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        location = ".".join(map(str, first_error["loc"])) or "the document"
        raise UsageError(
            f"{content} {path}: {location}: {first_error['msg']}", hint=hint
        ) from error


def _customer(name: str) -> str:
    """Return an address in checksum form, as in events; customers of a trace keep their names."""
    return to_checksum_address(name) if _ADDRESS.fullmatch(name) else name
