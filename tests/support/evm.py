"""An in-process EVM for tests: runs messages on py-evm's state, without blocks and signatures.

Time and block number change only when a test advances them. Structs are passed as mappings or
sequences, and returned as named tuples. A revert raises `Reverted` with the error's name and
arguments.
"""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from eth.db.atomic import AtomicDB
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.cancun.state import CancunState
from eth.vm.forks.cancun.transaction_context import CancunTransactionContext
from eth.vm.message import Message
from eth_abi import decode, encode
from eth_keys import keys
from eth_utils import keccak, to_canonical_address
from rlp import encode as rlp_encode

ARTIFACTS = (
    Path(__file__).resolve().parents[2] / "deepsquare_chain" / "chain" / "bindings" / "artifacts"
)
BLANK_ROOT = bytes.fromhex("56e81f171bcc55a6ff8345e692c0f86e5b48e01b996cadc001622fb5e363b421")
ZERO = "0x" + "00" * 20
CHAIN_ID = 31337
GAS = 60_000_000
BUILT_IN_ERRORS = [
    {"type": "error", "name": "Error", "inputs": [{"name": "message", "type": "string"}]},
    {"type": "error", "name": "Panic", "inputs": [{"name": "code", "type": "uint256"}]},
]


class Reverted(Exception):  # noqa: N818 - the chain's term
    """A call that reverted; `arguments` are those of the contract's error."""

    def __init__(self, name: str, args: tuple[Any, ...], data: bytes) -> None:
        super().__init__(name, *args)
        self.name = name
        self.arguments = args
        self.data = data


class Event:
    """One log, with the event's parameters as attributes."""

    def __init__(self, name: str, address: str, parameters: dict[str, Any]) -> None:
        self.name = name
        self.address = address
        self.parameters = parameters

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["parameters"][key]
        except KeyError:
            raise AttributeError(key) from None

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.parameters.items())})"


@dataclass(frozen=True)
class Receipt:
    """The return value, the events and the gas of a call that changed state."""

    value: Any
    events: list[Event]
    gas: int

    def named(self, *names: str) -> list[Event]:
        return [event for event in self.events if event.name in names]

    def one(self, name: str) -> Event:
        (event,) = self.named(name)
        return event


def selector_type(parameter: Mapping[str, Any]) -> str:
    """Return the canonical type of an ABI parameter, for signatures."""
    kind: str = parameter["type"]
    if not kind.startswith("tuple"):
        return kind
    inner = ",".join(selector_type(part) for part in parameter["components"])
    return f"({inner}){kind[5:]}"


def signature(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}({','.join(selector_type(part) for part in entry['inputs'])})"


@cache
def _record(fields: tuple[str, ...]) -> Any:
    return namedtuple("Record", fields)


def flatten(parameter: Mapping[str, Any], value: Any) -> Any:
    """Convert a value for eth-abi: structs, given as mappings or sequences, become tuples."""
    kind = parameter["type"]
    if kind.endswith("]"):
        inner = {**parameter, "type": kind[: kind.rindex("[")]}
        return [flatten(inner, item) for item in value]
    if kind != "tuple":
        return value
    parts = parameter["components"]
    if isinstance(value, Mapping):
        names = [part["name"] for part in parts]
        assert set(value) == set(names), f"fields {sorted(value)} instead of {sorted(names)}"
        value = [value[name] for name in names]
    assert len(value) == len(parts)
    return tuple(flatten(part, item) for part, item in zip(parts, value, strict=True))


def lift(parameter: Mapping[str, Any], value: Any) -> Any:
    """Convert the structs of a decoded value to named tuples."""
    kind = parameter["type"]
    if kind.endswith("]"):
        inner = {**parameter, "type": kind[: kind.rindex("[")]}
        return [lift(inner, item) for item in value]
    if kind != "tuple":
        return value
    parts = parameter["components"]
    items = (lift(part, item) for part, item in zip(parts, value, strict=True))
    return _record(tuple(part["name"] for part in parts))(*items)


class Coder:
    """Encodes and decodes one list of ABI parameters; computes their types once."""

    def __init__(self, parameters: Sequence[Mapping[str, Any]]) -> None:
        self.parameters = parameters
        self.types = [selector_type(part) for part in parameters]

    def encode(self, values: Sequence[Any]) -> bytes:
        pairs = zip(self.parameters, values, strict=True)
        return encode(self.types, [flatten(part, value) for part, value in pairs])

    def decode(self, data: bytes) -> tuple[Any, ...]:
        values = decode(self.types, data)
        return tuple(lift(p, v) for p, v in zip(self.parameters, values, strict=True))


class Function:
    """A function of a contract; views return their value, other functions a `Receipt`."""

    def __init__(self, contract: Contract, entry: Mapping[str, Any]) -> None:
        self.contract = contract
        self.name = entry["name"]
        self.selector = keccak(text=signature(entry))[:4]
        self.inputs = Coder(entry["inputs"])
        self.outputs = Coder(entry["outputs"])
        self.is_view = entry["stateMutability"] in {"view", "pure"}

    def encode(self, *values: Any) -> bytes:
        return self.selector + self.inputs.encode(values)

    def __call__(
        self, *values: Any, sender: str | None = None, gas: int = GAS, ether: int = 0
    ) -> Any:
        if not self.is_view and sender is None:
            raise TypeError(f"{self.name} changes state: name its sender")
        chain, to = self.contract.chain, self.contract.address
        data = self.encode(*values)
        if self.is_view:
            return self._value(chain.run(to, data, sender or ZERO, gas, keep=False).output)
        chain.last_call = (self.contract, self.name, values, sender or ZERO)
        computation = chain.run(to, data, sender or ZERO, gas, ether=ether)
        events = [chain.event(*log) for log in computation.get_log_entries()]
        return Receipt(self._value(computation.output), events, computation.get_gas_used())

    def _value(self, output: bytes) -> Any:
        values = self.outputs.decode(output)
        return values[0] if len(values) == 1 else values


class Contract:
    """A deployed contract, with its functions as attributes."""

    def __init__(self, chain: Chain, address: str, abi: Sequence[Mapping[str, Any]]) -> None:
        self.chain = chain
        self.address = address
        self.abi = abi
        self._functions = {
            entry["name"]: Function(self, entry) for entry in abi if entry["type"] == "function"
        }
        chain.learn(abi)

    def __getattr__(self, name: str) -> Function:
        try:
            return self.__dict__["_functions"][name]
        except KeyError:
            raise AttributeError(f"the contract has no function {name}") from None


class Chain:
    """State, clock and block number."""

    def __init__(self, now: int = 1_800_000_000) -> None:
        self.now = now
        self.block = 1_000
        self.state = CancunState(AtomicDB(), self._context(), BLANK_ROOT)
        self.last_call: tuple[Contract, str, tuple[Any, ...], str] | None = None
        self._errors: dict[bytes, tuple[str, Coder]] = {}
        self._events: dict[bytes, tuple[str, list[str], Coder, list[str], Coder]] = {}
        self.learn(BUILT_IN_ERRORS)

    def _context(self) -> ExecutionContext:
        return ExecutionContext(
            coinbase=b"\0" * 20,
            timestamp=self.now,
            block_number=self.block,
            difficulty=0,
            mix_hash=b"\0" * 32,
            gas_limit=GAS,
            prev_hashes=(),
            chain_id=CHAIN_ID,
            base_fee_per_gas=1,
            excess_blob_gas=0,
        )

    def learn(self, abi: Sequence[Mapping[str, Any]]) -> None:
        """Register errors and events, so that those of all contracts can be decoded."""
        for entry in abi:
            if entry["type"] == "error":
                key = keccak(text=signature(entry))[:4]
                self._errors[key] = (entry["name"], Coder(entry["inputs"]))
            elif entry["type"] == "event":
                topics = [part for part in entry["inputs"] if part["indexed"]]
                plain_inputs = [part for part in entry["inputs"] if not part["indexed"]]
                self._events[keccak(text=signature(entry))] = (
                    entry["name"],
                    [part["name"] for part in topics],
                    Coder(topics),
                    [part["name"] for part in plain_inputs],
                    Coder(plain_inputs),
                )

    def advance(self, seconds: int, blocks: int | None = None) -> None:
        """Advance time, by default with one block per second."""
        self.now += seconds
        self.block += seconds if blocks is None else blocks
        self.state.execution_context = self._context()

    def snapshot(self) -> tuple[Any, int, int]:
        return self.state.snapshot(), self.now, self.block

    def revert(self, snapshot: tuple[Any, int, int]) -> None:
        """Restore a snapshot; each can be used once."""
        inner, self.now, self.block = snapshot
        self.state.revert(inner)
        self.state.execution_context = self._context()

    def deploy(self, artifact: Mapping[str, Any], *values: Any, sender: str) -> Contract:
        """Deploy a contract; raises `Reverted` if its constructor reverts."""
        inputs = next((e["inputs"] for e in artifact["abi"] if e["type"] == "constructor"), [])
        self.learn(artifact["abi"])
        code = bytes.fromhex(artifact["bytecode"][2:]) + Coder(inputs).encode(values)
        canonical = to_canonical_address(sender)
        nonce = self.state.get_nonce(canonical)
        address = keccak(rlp_encode([canonical, nonce]))[-20:]
        self.state.increment_nonce(canonical)
        message = Message(
            gas=GAS, to=b"", sender=canonical, value=0, data=b"", code=code, create_address=address
        )
        self._finish(self.state.computation_class.apply_create_message, message, canonical)
        return Contract(self, "0x" + address.hex(), artifact["abi"])

    def run(
        self,
        to: str,
        data: bytes,
        sender: str,
        gas: int = GAS,
        *,
        keep: bool = True,
        ether: int = 0,
    ) -> Any:
        """Run one message as a separate transaction; without `keep`, as a static call."""
        canonical, target = to_canonical_address(sender), to_canonical_address(to)
        message = Message(
            gas=gas,
            to=target,
            sender=canonical,
            value=ether,
            data=data,
            code=self.state.get_code(target),
            is_static=not keep,
        )
        return self._finish(self.state.computation_class.apply_message, message, canonical)

    def _finish(self, apply: Any, message: Message, origin: bytes) -> Any:
        context = CancunTransactionContext(gas_price=1, origin=origin)
        computation = apply(self.state, message, context)
        self.state.clear_transient_storage()
        if computation.is_error:
            raise self.error(computation.output, computation.error)
        return computation

    def error(self, data: bytes, cause: Exception) -> Reverted:
        known = self._errors.get(data[:4])
        if known is None:
            return Reverted(type(cause).__name__ if not data else data[:4].hex(), (), data)
        name, coder = known
        return Reverted(name, coder.decode(data[4:]), data)

    def event(self, address: bytes, topics: Sequence[int], data: bytes) -> Event:
        words = [topic.to_bytes(32, "big") for topic in topics]
        name, indexed, topic_coder, plain_inputs, coder = self._events[words[0]]
        parameters = dict(zip(indexed, topic_coder.decode(b"".join(words[1:])), strict=True))
        parameters |= dict(zip(plain_inputs, coder.decode(data), strict=True))
        return Event(name, "0x" + address.hex(), parameters)

    def error_name(self, selector: bytes) -> str:
        """Return the name of an error by its selector."""
        return self._errors[selector][0]


def load_artifact(name: str) -> dict[str, Any]:
    artifact: dict[str, Any] = json.loads((ARTIFACTS / f"{name}.json").read_text(encoding="utf-8"))
    return artifact


def private_key(name: str) -> keys.PrivateKey:
    """Return the private key of a named test account."""
    return keys.PrivateKey(keccak(text=f"person {name}"))


_KEYS: dict[str, keys.PrivateKey] = {}


@cache
def person(name: str) -> str:
    """Return the address of a named test account, in lower case as decoded by eth-abi."""
    key = private_key(name)
    address: str = key.public_key.to_address()
    _KEYS[address] = key
    return address


def sign(account: str, digest: bytes) -> tuple[int, bytes, bytes]:
    """Sign a digest with a test account; return v, r and s."""
    signed = _KEYS[account].sign_msg_hash(digest)
    return signed.v + 27, signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")


@contextmanager
def reverts(name: str, *arguments: Any) -> Iterator[None]:
    """Assert that the block reverts with this error and, if given, these arguments."""
    with pytest.raises(Reverted) as error_info:
        yield
    assert error_info.value.name == name, f"{error_info.value!r} instead of {name}"
    if arguments:
        assert error_info.value.arguments == arguments
