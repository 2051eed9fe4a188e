"""Pages that ask the node as well: transaction, contracts, audit."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pydantic_core
from eth_utils.address import is_address, to_checksum_address
from starlette.requests import Request
from starlette.responses import Response
from web3.exceptions import ContractLogicError, TransactionNotFound, Web3Exception

from deepsquare_chain.chain.abi import (
    Abi,
    AbiError,
    Function,
    interface,
    interfaces,
    signature_of,
    type_of,
)
from deepsquare_chain.chain.artifacts import CONTRACTS, load_artifact
from deepsquare_chain.chain.reverts import decode_revert
from deepsquare_chain.errors import GridError, NotFoundError, UsageError
from deepsquare_chain.explorer.audit import Audit
from deepsquare_chain.explorer.books import Finding
from deepsquare_chain.explorer.ledger import Ledger
from deepsquare_chain.explorer.reader import audit_chain
from deepsquare_chain.explorer.web import texts
from deepsquare_chain.explorer.web.site import Site

_MAX_ARGUMENT: Final = 2_000


# -- a transaction


async def transaction(site: Site, request: Request) -> Response:
    """A transaction: from the index where it made events, else from the node."""
    tx_hash = str(request.path_params["hash"]).lower()
    if not (len(tx_hash) == 66 and tx_hash.startswith("0x") and _is_hex(tx_hash[2:])):
        raise NotFoundError(f"{tx_hash[:80]!r} is no hash of a transaction")
    found = await _indexed(site, tx_hash, patient=request.query_params.get("wait") == "1")
    values = found if found is not None else await _from_node(site, tx_hash)
    values["call"] = decode_call(site, values["to"], values["input"])
    return await site.page(request, "transaction.html", hash=tx_hash, **values)


async def _indexed(site: Site, tx_hash: str, *, patient: bool) -> dict[str, Any] | None:
    """What the index holds; the wallet's own page waits a moment for what it just sent."""
    for _ in range(8 if patient else 1):
        try:
            found = await site.ask(site.index.transaction, tx_hash)
        except NotFoundError:
            if patient:
                await asyncio.sleep(0.5)
            continue
        row = found.row
        return {
            "ok": row.ok,
            "finalized": row.at.finalized,
            "block": row.at.block,
            "time": row.at.time,
            "sender": row.sender,
            "to": row.to,
            "created": row.to is None,
            "nonce": found.nonce,
            "gas_used": row.gas_used,
            "gas_price": row.gas_price,
            "value": found.value,
            "input": found.input,
            "events": found.events,
            "more_events": found.more_events,
            "movements": found.movements,
            "refusal": "",
        }
    return None


async def _from_node(site: Site, tx_hash: str) -> dict[str, Any]:
    """A transaction without events of the grid, such as a refused one."""
    w3 = site.contracts.w3
    try:
        sent = await w3.eth.get_transaction(tx_hash)  # type: ignore[arg-type]
        receipt = await w3.eth.get_transaction_receipt(tx_hash)  # type: ignore[arg-type]
    except TransactionNotFound:
        raise NotFoundError(
            f"No block of this chain holds transaction {tx_hash}",
            hint="It may be waiting for a block, or may have been replaced.",
        ) from None
    block = await w3.eth.get_block(receipt["blockNumber"])
    state = await site.ask(site.index.status)
    ok = receipt["status"] == 1
    return {
        "ok": ok,
        "finalized": receipt["blockNumber"] <= state.finalized,
        "block": int(receipt["blockNumber"]),
        "time": int(block["timestamp"]),
        "sender": str(sent["from"]),
        "to": sent.get("to"),
        "created": not sent.get("to"),
        "nonce": int(sent["nonce"]),
        "gas_used": int(receipt["gasUsed"]),
        "gas_price": int(receipt.get("effectiveGasPrice", 0)),
        "value": int(sent["value"]),
        "input": "0x" + bytes(sent["input"]).hex(),
        "events": (),
        "more_events": False,
        "movements": (),
        "refusal": "" if ok else await _refusal(site, sent),
    }


async def _refusal(site: Site, sent: Mapping[str, Any]) -> str:
    """Why it was refused, by calling it again on the state before its block."""
    call = {key: sent[key] for key in ("from", "to", "value") if sent.get(key) is not None}
    call |= {"data": sent["input"], "gas": sent["gas"]}
    try:
        await site.contracts.w3.eth.call(call, int(sent["blockNumber"]) - 1)  # type: ignore[arg-type]
    except ContractLogicError as error:
        return decode_revert(error).message
    except (Web3Exception, GridError):
        return "The node does not tell why."
    return "It would have passed one block earlier: something else in its block came first."


def decode_call(site: Site, to: str | None, data: str) -> dict[str, Any] | None:
    """The function and arguments of a call of our contracts, None for anything else."""
    names = dict(zip(site.contracts.addresses, CONTRACTS, strict=False))
    names = {
        site.contracts.credit.address: "Credit",
        site.contracts.registry.address: "ProviderRegistry",
        site.contracts.scheduler.address: "MetaScheduler",
    }
    if not to or not is_address(to) or to_checksum_address(to) not in names:
        return None
    contract = names[to_checksum_address(to)]
    try:
        raw = bytes.fromhex(data.removeprefix("0x"))
        entry, function = _by_selector(contract, raw[:4])
        arguments = Function("", b"", (), tuple(entry["inputs"])).decode(raw[4:])
    except (AbiError, KeyError, ValueError):
        return None
    return {
        "contract": contract,
        "method": function.name,
        "arguments": {
            part["name"] or f"argument {i + 1}": _shown(part, value)
            for i, (part, value) in enumerate(zip(entry["inputs"], arguments, strict=True))
        },
    }


def _by_selector(contract: str, selector: bytes) -> tuple[Abi, Function]:
    for entry in interface(contract).entries("function"):
        function = interface(contract).function(entry["name"])
        if function.selector == selector:
            return entry, function
    raise KeyError(selector.hex())


def _shown(parameter: Abi, value: Any) -> Any:
    """A decoded value with the names of its fields, bytes as hexadecimal."""
    kind = str(parameter["type"])
    if kind.endswith("]"):
        inner = {**parameter, "type": kind[: kind.rindex("[")]}
        return [_shown(inner, each) for each in value]
    if kind == "tuple":
        pairs = zip(parameter["components"], value, strict=True)
        return {part["name"]: _shown(part, each) for part, each in pairs}
    return "0x" + value.hex() if isinstance(value, bytes) else value


def _is_hex(text: str) -> bool:
    return all(each in "0123456789abcdef" for each in text)


# -- contracts


async def contracts(site: Site, request: Request) -> Response:
    """The three contracts, their parameters and roles."""
    rows = [
        {"name": name, "address": address, "matches": await _matches(site, name)}
        for name, address in _addresses(site).items()
    ]
    parameters, roles = await asyncio.gather(
        site.ask(site.index.parameters), site.ask(site.index.roles)
    )
    return await site.page(
        request, "contracts.html", contracts=rows, parameters=parameters, roles=roles
    )


async def contract(site: Site, request: Request) -> Response:
    """One contract: its functions, which can be asked here."""
    name = str(request.path_params["name"])
    if name not in CONTRACTS:
        raise NotFoundError(f"There is no contract {name[:60]!r} here", hint=", ".join(CONTRACTS))
    face = interface(name)
    entries = sorted(face.entries("function"), key=lambda each: str(each["name"]))
    reads = [each for each in entries if each["stateMutability"] in ("view", "pure")]
    writes = [each for each in entries if each not in reads]
    asked = request.query_params.get("call")
    return await site.page(
        request,
        "contract.html",
        name=name,
        address=_addresses(site)[name],
        matches=await _matches(site, name),
        answer=await _answer(site, name, reads, request) if asked else None,
        reads=[
            {
                "signature": signature_of(each),
                "inputs": [{"name": i["name"], "type": type_of(i)} for i in each["inputs"]],
                "outputs": ", ".join(_output(o) for o in each["outputs"]),
            }
            for each in reads
        ],
        rest=[
            ("calls that change something", [signature_of(each) for each in writes]),
            ("events", [signature_of(each) for each in face.entries("event")]),
            ("errors", [signature_of(each) for each in face.entries("error")]),
        ],
        abi=json.dumps([dict(each) for each in load_artifact(name).abi], separators=(",", ":")),
    )


def _output(part: Abi) -> str:
    return f"{type_of(part)} {part['name']}".strip()


def _addresses(site: Site) -> dict[str, str]:
    grid = site.contracts
    return {
        "MetaScheduler": grid.scheduler.address,
        "ProviderRegistry": grid.registry.address,
        "Credit": grid.credit.address,
    }


async def _matches(site: Site, name: str) -> bool | None:
    """Whether the code at a contract's address is this program's; None when nobody answers."""
    try:
        address = to_checksum_address(_addresses(site)[name])
        code = bytes(await site.contracts.w3.eth.get_code(address))
    except (GridError, Web3Exception):
        return None
    return load_artifact(name).matches(code)


async def _answer(
    site: Site, name: str, reads: Sequence[Abi], request: Request
) -> dict[str, object]:
    """What a view says to the arguments of the form."""
    wanted = request.query_params["call"]
    entry = next((each for each in reads if signature_of(each) == wanted), None)
    if entry is None:
        raise NotFoundError(f"{name} has no view {wanted[:80]!r}")
    function = interface(name).function(entry["name"])
    try:
        arguments = [
            _argument(part, request.query_params.get(f"a{i}", ""))
            for i, part in enumerate(entry["inputs"])
        ]
        call = {
            "to": to_checksum_address(_addresses(site)[name]),
            "data": "0x" + function.encode(*arguments).hex(),
        }
        raw = bytes(await site.contracts.w3.eth.call(call))  # type: ignore[arg-type]
        values = function.decode(raw)
    except ContractLogicError as error:
        return {"name": wanted, "ok": False, "text": decode_revert(error).message}
    except (GridError, Web3Exception, AbiError, TypeError, OverflowError) as error:
        return {"name": wanted, "ok": False, "text": str(error)[:400]}
    shown = [_shown(part, value) for part, value in zip(entry["outputs"], values, strict=True)]
    return {"name": wanted, "ok": True, "text": _joined(entry["outputs"], shown)}


def _joined(parts: Sequence[Abi], values: Sequence[Any]) -> Any:
    if len(values) == 1:
        return texts.value(values[0])
    names = (part["name"] or str(i + 1) for i, part in enumerate(parts))
    return texts.value(dict(zip(names, values, strict=True)))


def _argument(part: Abi, text: str) -> Any:
    """A typed value from a form's text; lists and structs are written as JSON."""
    kind = type_of(part)
    if len(text) > _MAX_ARGUMENT:
        raise UsageError(f"The value of {part['name'] or kind} is too long")
    try:
        return _typed(kind, text.strip())
    except ValueError:
        raise UsageError(f"{text[:60]!r} is no {kind}") from None


def _typed(kind: str, text: str) -> Any:
    if kind.endswith("]") or kind.startswith("("):
        return _tree(pydantic_core.from_json(text))
    if kind.startswith(("uint", "int")):
        return int(text, 0)
    if kind.startswith("bytes"):
        return bytes.fromhex(text.removeprefix("0x"))
    if kind == "bool":
        return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    if kind == "address" and not is_address(text):
        raise ValueError
    return text


def _tree(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tree(each) for each in value)
    if isinstance(value, str) and value.startswith("0x") and len(value) != 42:
        return bytes.fromhex(value[2:])
    return value


# -- audit


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found, as its page shows it."""

    block: int
    ok: bool
    difference: int
    events: int
    jobs: int
    checks: tuple[Any, ...]
    findings: tuple[Finding, ...]
    exceptions: tuple[Any, ...]


class Auditor:
    """Audits the chain in the background, at most every so many seconds, one at a time.

    Args:
        site: Whose contracts.
        every: Seconds between the end of an audit and the start of the next.
    """

    def __init__(self, site: Site, *, every: float = 20.0) -> None:
        self._site = site
        self._every = every
        self._lock = asyncio.Lock()
        self._made_at = 0.0
        self.report: Report | None = None
        self.trouble = ""

    async def now(self, patience: float = 8.0) -> Report | None:
        """The latest report; the first one is waited for as long as a reader would."""
        task = asyncio.create_task(self._renew())
        _running.add(task)
        task.add_done_callback(_running.discard)
        await asyncio.wait({task}, timeout=patience if self.report is None else 0.5)
        return self.report

    async def _renew(self) -> None:
        if self._lock.locked():
            return
        async with self._lock:
            if self.report is not None and time.monotonic() - self._made_at < self._every:
                return
            try:
                ledger, audit = await audit_chain(self._site.contracts)
                self.report, self.trouble = await asyncio.to_thread(_report, ledger, audit), ""
            except (GridError, Web3Exception) as error:
                self.trouble = f"The audit could not be made: {error}"
            self._made_at = time.monotonic()


_running: set[asyncio.Task[None]] = set()


async def audit(site: Site, auditor: Auditor, request: Request) -> Response:
    """Conservation, findings and exceptions, from the node and not from the index."""
    report = await auditor.now()
    trouble = auditor.trouble or ("" if report else "The audit is under way …")
    return await site.page(request, "audit.html", report=report, trouble=trouble)



def _report(ledger: Ledger, found: Audit) -> Report:
    return Report(
        block=found.block,
        ok=found.ok,
        difference=found.difference,
        events=ledger.events,
        jobs=found.totals.jobs,
        checks=conservation(ledger),
        findings=found.findings,
        exceptions=exceptions(ledger),
    )
