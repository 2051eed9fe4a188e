"""Runs a complete audit of a chain at a block, or of an export, with the requested checks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.audit.anomalies import Anomaly, Code, name_self_scheduled
from deepsquare_chain.audit.bill import JobBill, recompute_bill
from deepsquare_chain.audit.conservation import (
    Audit,
    ConservationCheck,
    Storage,
    closing_check,
    conservation,
    verify,
)
from deepsquare_chain.audit.entries import AuditFinding
from deepsquare_chain.audit.export import compare_with_chain, log_line, replay_export
from deepsquare_chain.audit.ledger import Ledger, Statement
from deepsquare_chain.audit.ledger import statement as statement_of
from deepsquare_chain.audit.proofs import ProofError, check_header, check_receipts, may_contain
from deepsquare_chain.audit.reader import (
    LogSink,
    Progress,
    read_history,
    read_storage,
    request_each,
)
from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.responses import node_message
from deepsquare_chain.errors import AuditError, EndpointError
from deepsquare_chain.job import JobFlags

_HEADERS_PER_REQUEST: Final = 100
_MAX_FINDINGS: Final = 100

#: SHA-256 over the logs of each block that has logs.
Digests = Mapping[int, str]


class LogDigests(LogSink):
    """A log sink that keeps the hash of each block with logs, and a digest of these logs."""

    def __init__(self) -> None:
        self.hashes: dict[int, str] = {}
        self._sums: dict[int, Any] = {}

    def begin(self) -> None:
        """Clear all digests and hashes."""
        self._sums.clear()
        self.hashes.clear()

    def take(self, logs: Sequence[Mapping[str, Any]]) -> None:
        """Add logs in chain order."""
        for log in logs:
            block = int(log["blockNumber"], 16)
            self._sums.setdefault(block, hashlib.sha256()).update(log_line(log))
            self.hashes[block] = log["blockHash"]

    @property
    def digests(self) -> Digests:
        """Digests by block."""
        return {block: digest.hexdigest() for block, digest in self._sums.items()}


def digest_of_logs(logs: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of the logs of one block, as computed by `LogDigests`."""
    return hashlib.sha256(b"".join(log_line(log) for log in logs)).hexdigest()


async def prove(
    w3: AsyncWeb3[Any],
    deployment: Deployment,
    node_logs: LogDigests,
    to_block: int,
    *,
    progress: Progress | None = None,
) -> list[AuditFinding]:
    """Prove from block headers that a node returned all logs of a grid and no others.

    Every header since the deployment is hashed and linked to its parent. If the bloom filter of a
    block may match the contracts, its receipts are fetched and their trie is rebuilt. Only the hash
    of `to_block` must be trusted. `node_logs` are the digests of what `eth_getLogs` returned.

    Raises:
        EndpointError: The node does not answer, or refuses receipts.
    """
    proof = _Proof(w3, deployment, node_logs)
    for first in range(deployment.block, to_block + 1, _HEADERS_PER_REQUEST):
        last = min(to_block, first + _HEADERS_PER_REQUEST - 1)
        await proof.blocks(range(first, last + 1))
        if progress is not None:
            progress(last, to_block)
        if len(proof.findings) >= _MAX_FINDINGS:
            break
    return proof.findings


class _Proof:
    def __init__(self, w3: AsyncWeb3[Any], deployment: Deployment, node_logs: LogDigests) -> None:
        self.findings: list[AuditFinding] = []
        self._w3 = w3
        self._addresses = [address.lower() for address in deployment.addresses]
        self._digests, self._hashes = node_logs.digests, node_logs.hashes
        self._parent = ""

    async def blocks(self, numbers: range) -> None:
        """Prove a range of blocks by headers, and by receipts if a block may have our logs."""
        requests = [("eth_getBlockByNumber", [hex(number), False]) for number in numbers]
        for number, header in zip(numbers, await self._request(requests), strict=True):
            try:
                await self._block(number, header)
            except ProofError as error:
                message = f"block {number} is invalid: {error}"
                self.findings.append(AuditFinding("proof", message, number))
            self._parent = header.get("hash", "") if isinstance(header, Mapping) else ""

    async def _block(self, number: int, header: Any) -> None:
        if not isinstance(header, Mapping) or header.get("number") != hex(number):
            raise ProofError("the node does not have it")
        check_header(header, self._parent)
        if self._hashes.get(number, header["hash"]) != header["hash"]:
            raise ProofError(f"its logs name the block {self._hashes[number]}")
        if not any(may_contain(header, address) for address in self._addresses):
            if number in self._digests:
                raise ProofError("its bloom filter excludes the logs that the node returned for it")
            return
        logs = check_receipts(header, await self._receipts(header))
        # The trie contains no block hashes or log indexes. Derive them from the position in the
        # trie instead of using the node's values: EthereumJS numbers the logs of
        # eth_getBlockReceipts from the transaction's index.
        indexed_logs = [
            {**log, "logIndex": hex(index), "blockHash": header["hash"]}
            for index, log in enumerate(logs)
        ]
        grid_logs = [log for log in indexed_logs if log["address"].lower() in self._addresses]
        if digest_of_logs(grid_logs) != self._digests.get(number, digest_of_logs([])):
            raise ProofError(
                f"it holds {len(grid_logs)} logs of the grid, and not those that the node returned"
            )

    async def _receipts(self, header: Mapping[str, Any]) -> list[Any]:
        """Return all receipts of a block, one by one if the node lacks the bulk method."""
        hashes = header["transactions"]
        try:
            (receipts,) = await self._request([("eth_getBlockReceipts", [header["number"]])])
        except EndpointError:
            requests = [("eth_getTransactionReceipt", [tx_hash]) for tx_hash in hashes]
            receipts = await self._request(requests)
        if not isinstance(receipts, list) or len(receipts) != len(hashes) or None in receipts:
            raise ProofError("the node does not return its receipts")
        for receipt, tx_hash in zip(receipts, hashes, strict=True):
            if any(log["transactionHash"] != tx_hash for log in receipt["logs"]):
                raise ProofError(f"a log of transaction {tx_hash} names another")
        return receipts

    async def _request(self, requests: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        try:
            return await ask_all(self._w3, requests)
        except Web3RPCError as error:
            raise EndpointError(f"The node rejected a proof: {node_message(error)}") from None


async def compare_endpoints(
    other: AsyncWeb3[Any],
    deployment: Deployment,
    node_logs: LogDigests,
    to_block: int,
    block_hash: str,
    *,
    progress: Progress | None = None,
) -> list[AuditFinding]:
    """Return a finding for each block whose logs differ on another node, and for another last hash.

    Raises:
        EndpointError: The other node does not answer, or does not have the last block.
    """
    other_logs = LogDigests()
    history = await read_history(
        other, deployment, to_block=to_block, progress=progress, sink=other_logs
    )
    findings = []
    if history.block_hash != block_hash:
        message = f"block {to_block} is {block_hash} here and {history.block_hash} there"
        findings.append(AuditFinding("endpoint", message, to_block))
    digests, other_digests = node_logs.digests, other_logs.digests
    for block in sorted({*digests, *other_digests}):
        if digests.get(block) != other_digests.get(block):
            message = f"the endpoints return different logs of block {block}"
            findings.append(AuditFinding("endpoint", message, block))
    return findings[:_MAX_FINDINGS]


#: Opens a progress bar with the given title.
Bars = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def silent(_title: str) -> Iterator[Progress]:
    """Show no progress bar."""
    yield lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """Checks that an audit makes in addition to replaying events."""

    #: Compare the ledger with the storage of the contracts.
    storage: bool = True
    #: Prove the logs against the block headers.
    proofs: bool = False
    #: A second endpoint that must return the same logs.
    other: AsyncWeb3[Any] | None = None
    #: Hash of the last block from a trusted source; empty for none.
    block_hash: str = ""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of an audit. `block_hash` is empty if the audit did not read from a chain."""

    audit: Audit
    ledger: Ledger
    checks: tuple[ConservationCheck, ...]
    anomalies: tuple[Anomaly, ...]
    block_hash: str
    proven: bool

    @property
    def ok(self) -> bool:
        """Whether there are no findings and all sums agree. Anomalies do not count as faults."""
        return self.audit.ok and all(check.ok for check in self.checks)


async def audit_grid(
    contracts: Contracts,
    *,
    to_block: int | None = None,
    options: AuditOptions | None = None,
    bars: Bars = silent,
) -> AuditReport:
    """Rebuild the ledger of a grid from its events up to a block, and verify it.

    Raises:
        EndpointError: A node does not answer, or has no state of that block.
        AuditError: No ledger can be built from the events.
    """
    checks = options or AuditOptions()
    # Only proofs and the comparison of endpoints need digests of each block's logs.
    digests = LogDigests() if checks.proofs or checks.other is not None else None
    with bars("Reading events") as progress:
        history = await read_history(
            contracts.w3, contracts.deployment, to_block=to_block, progress=progress, sink=digests
        )
    ledger, last_block = history.ledger(contracts.deployment), history.to_block
    findings: list[AuditFinding] = []
    if checks.block_hash and checks.block_hash.lower() != history.block_hash:
        hashes = f"{history.block_hash}, not {checks.block_hash[:80]}"
        message = f"block {last_block} has the hash {hashes}"
        findings.append(AuditFinding("endpoint", message, last_block))
    if checks.proofs and digests is not None:
        with bars("Proving logs") as progress:
            findings += await prove(
                contracts.w3, contracts.deployment, digests, last_block, progress=progress
            )
    if checks.other is not None and digests is not None:
        with bars("Comparing endpoints") as progress:
            findings += await compare_endpoints(
                checks.other,
                contracts.deployment,
                digests,
                last_block,
                history.block_hash,
                progress=progress,
            )
    storage = await read_storage(contracts, ledger, last_block) if checks.storage else None
    report = _report(ledger, storage, findings, history.block_hash, proven=checks.proofs)
    return await _with_senders(contracts, report)


async def audit_export(
    contracts: Contracts | None,
    path: Path,
    *,
    options: AuditOptions | None = None,
    bars: Bars = silent,
) -> AuditReport:
    """Replay an export and verify it; unless `contracts` is None, compare it with the chain too.

    Raises:
        NotFoundError: There is no export.
        AuditError: Its manifest is invalid, or no ledger can be built from its logs.
        EndpointError: The node does not answer, or does not have the export's last block.
    """
    checks = options or AuditOptions()
    replayed = replay_export(path)
    findings, block_hash, storage = list(replayed.findings), "", None
    if replayed.ledger is None:
        summary = "; ".join(str(finding) for finding in findings[:3])
        raise AuditError(
            f"The export can't be replayed: {summary}",
            hint="Export again with `deepsquare audit export`.",
        )
    if contracts is not None:
        with bars("Comparing with the chain") as progress:
            chain_findings = await compare_with_chain(contracts, path, progress=progress)
        findings += chain_findings
        if not any(finding.code == "manifest" for finding in chain_findings):
            block_hash = replayed.manifest.block_hash
            if checks.storage:
                last_block = replayed.manifest.last_block
                storage = await read_storage(contracts, replayed.ledger, last_block)
    replay_findings = {id(finding) for finding in replayed.ledger.findings}
    others = [finding for finding in findings if id(finding) not in replay_findings]
    report = _report(replayed.ledger, storage, others, block_hash, proven=False)
    # A chain that differs from the export may not have these transactions.
    if contracts is None or not block_hash or others:
        return report
    return await _with_senders(contracts, report)


def _report(
    ledger: Ledger,
    storage: Storage | None,
    more: list[AuditFinding],
    block_hash: str,
    *,
    proven: bool,
) -> AuditReport:
    audit = verify(ledger, storage)
    audit = replace(audit, findings=(*audit.findings, *more))
    scheduler, balances = ledger.deployment.scheduler, storage.balances if storage else {}
    checks = conservation(
        audit.totals,
        ledger.deployment,
        ledger.block,
        supply=storage.supply if storage else None,
        scheduler_balance=balances.get(scheduler, 0) if storage else None,
        live=[job.id for job in ledger.jobs.values() if job.status.is_live],
        parked=sorted(ledger.parked),
    )
    return AuditReport(audit, ledger, tuple(checks), tuple(ledger.anomalies), block_hash, proven)


async def _with_senders(contracts: Contracts, report: AuditReport) -> AuditReport:
    """Read the transactions of late assignments to find those that providers made themselves.

    Adds a finding for each self-assignment that the customer had forbidden.
    """
    late = [row for row in report.anomalies if row.code is Code.LATE_ASSIGNMENT]
    transactions = await request_each(
        lambda tx_hash: contracts.w3.eth.get_transaction(HexBytes(tx_hash)),
        sorted({row.tx_hash for row in late}),
    )
    senders = {tx_hash: str(transaction["from"]) for tx_hash, transaction in transactions.items()}
    anomalies = name_self_scheduled(report.anomalies, senders)
    self_schedule = interface("MetaScheduler").function("selfSchedule").selector
    self_assigned = [
        row for row in late if bytes(transactions[row.tx_hash]["input"])[:4] == self_schedule
    ]
    forbidden = forbidden_self_scheduling(report.ledger, self_assigned)
    audit = replace(report.audit, findings=(*report.audit.findings, *forbidden))
    return replace(report, audit=audit, anomalies=tuple(anomalies))


def forbidden_self_scheduling(
    ledger: Ledger, self_assigned: Iterable[Anomaly]
) -> list[AuditFinding]:
    """Return a finding for each assignment by `selfSchedule` that the job's flags forbid."""
    return [
        AuditFinding(
            "flags",
            f"{row.account} assigned job {row.job_id} to itself, which its customer forbids",
            row.block,
            row.tx_hash,
            row.job_id,
        )
        for row in self_assigned
        if JobFlags.NO_SELF_SCHEDULING in ledger.jobs[row.job_id].terms.flags
    ]


async def account_statement(
    contracts: Contracts,
    account: str,
    *,
    first: int = 0,
    last: int | None = None,
    bars: Bars = silent,
) -> tuple[Statement, dict[int, str], ConservationCheck]:
    """Return an account's statement over a range of blocks, the names of its jobs, and a check.

    The check compares the closing balance with `balanceOf` at the last block.

    Raises:
        EndpointError: The node does not answer, or has no state of the last block.
    """
    with bars("Reading events") as progress:
        history = await read_history(
            contracts.w3, contracts.deployment, to_block=last, progress=progress
        )
    ledger = history.ledger(contracts.deployment)
    statement = statement_of(ledger, account, first, history.to_block)
    balance = 0
    # The token contract does not exist before the deployment.
    if history.to_block >= contracts.deployment.block:
        balance = await contracts.credit.balance_of(account, block=history.to_block)
    names = {row.job_id: ledger.jobs[row.job_id].name for row in statement.rows if row.job_id}
    return statement, names, closing_check(ledger, statement, balance)


async def job_bill(contracts: Contracts, ledger: Ledger, job_id: int) -> JobBill:
    """Recompute a job's bill, using the seconds that the provider's transaction reports."""
    job = ledger.jobs[job_id]
    reported = None
    if job.status.is_final and job.exit_code is not None:
        transaction = await contracts.w3.eth.get_transaction(HexBytes(job.transitions[-1][2]))
        reported = reported_seconds(bytes(transaction["input"]), job_id)
    return recompute_bill(job, now=ledger.time, reported=reported)


def reported_seconds(calldata: bytes, job_id: int) -> int | None:
    """Return the seconds that a `finish` call reports for a job; None for other calldata."""
    try:
        function, arguments = interface("MetaScheduler").read_call(calldata)
    except AbiError:
        return None
    if function.name != "finish":
        return None
    # If a batch names a job twice, the first report ends the job.
    return next((int(report[1]) for report in arguments[0] if report[0] == job_id), None)
