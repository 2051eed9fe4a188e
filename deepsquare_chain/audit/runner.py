"""Audits as a whole: of a chain at a block, or of an export, with every check that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hexbytes import HexBytes
from web3 import AsyncWeb3

from deepsquare_chain.audit.anomalies import Anomaly, Code, name_self_scheduled
from deepsquare_chain.audit.bill import JobBill, recompute_bill
from deepsquare_chain.audit.checks import Audit, Storage, verify
from deepsquare_chain.audit.conservation import ConservationCheck, conservation
from deepsquare_chain.audit.entries import AuditFinding
from deepsquare_chain.audit.export_io import compare_with_chain, replay_export
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.audit.log_proofs import LogDigests, compare_endpoints, prove
from deepsquare_chain.audit.reader import Progress, read_chronicle, read_storage
from deepsquare_chain.audit.statement import Statement, closing_check
from deepsquare_chain.audit.statement import statement as statement_of
from deepsquare_chain.chain.bindings.abi import AbiError, decode_values, interface
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.errors import AuditError
from deepsquare_chain.job import JobFlags

#: Transactions that are asked for at once.
_READS: Final = 50

#: Opens a bar with a title for one piece of work.
Bars = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def silent(_title: str) -> Iterator[Progress]:
    """No bar at all."""
    yield lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class Depth:
    """How far an audit goes beyond the events.

    Args:
        storage: Compare with what the contracts hold.
        proofs: Prove the logs by the block headers.
        other: A second endpoint that must tell the same logs.
        block_hash: Hash of the last block from somewhere that is trusted; empty for none.
    """

    storage: bool = True
    proofs: bool = False
    other: AsyncWeb3[Any] | None = None
    block_hash: str = ""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """An audit with both sides of each sum; `block_hash` is empty where no chain was asked."""

    audit: Audit
    ledger: Ledger
    checks: tuple[ConservationCheck, ...]
    exceptions: tuple[Anomaly, ...]
    block_hash: str
    proven: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; exceptions are lawful."""
        return self.audit.ok and all(check.ok for check in self.checks)


async def audit_grid(
    contracts: Contracts,
    *,
    to_block: int | None = None,
    depth: Depth | None = None,
    bars: Bars = silent,
) -> AuditReport:
    """Rebuild the books of a chain at a block and judge them.

    Raises:
        EndpointError: A node does not answer, or keeps no state of that block.
        AuditError: The events can't be read as books at all.
    """
    how = depth or Depth()
    # Digests of every block's logs are kept only where somebody asks for them.
    digests = LogDigests() if how.proofs or how.other is not None else None
    with bars("Reading events") as progress:
        found = await read_chronicle(
            contracts.w3, contracts.deployment, to_block=to_block, progress=progress, sink=digests
        )
    ledger, last = found.ledger(contracts.deployment), found.to_block
    more: list[AuditFinding] = []
    if how.block_hash and how.block_hash.lower() != found.block_hash:
        message = f"block {last} has the hash {found.block_hash}, not {how.block_hash[:80]}"
        more.append(AuditFinding("endpoint", message, last, ""))
    if how.proofs and digests is not None:
        with bars("Proving logs") as progress:
            more += await prove(
                contracts.w3, contracts.deployment, digests, last, progress=progress
            )
    if how.other is not None and digests is not None:
        with bars("Comparing endpoints") as progress:
            more += await compare_endpoints(
                how.other, contracts.deployment, digests, last, found.block_hash, progress=progress
            )
    storage = await read_storage(contracts, ledger, last) if how.storage else None
    report = _report(ledger, storage, more, found.block_hash, proven=how.proofs)
    return await _with_senders(contracts, report)


async def audit_export(
    contracts: Contracts | None,
    path: Path,
    *,
    depth: Depth | None = None,
    bars: Bars = silent,
) -> AuditReport:
    """Replay an export, against itself and, unless `contracts` is None, against a chain.

    Raises:
        NotFoundError: There is no export.
        AuditError: Its manifest can't be trusted, or its logs can't be read as books.
        EndpointError: The node does not answer, or does not know the export's last block.
    """
    how = depth or Depth()
    replayed = replay_export(path)
    more, block_hash, storage = list(replayed.findings), "", None
    if contracts is not None:
        with bars("Comparing with the chain") as progress:
            against = await compare_with_chain(contracts, path, progress=progress)
        more += against
        wrong_manifest = any(finding.code == "manifest" for finding in against)
        if replayed.ledger is not None and not wrong_manifest:
            block_hash = replayed.manifest.block_hash
            if how.storage:
                last = replayed.manifest.last_block
                storage = await read_storage(contracts, replayed.ledger, last)
    if replayed.ledger is None:
        words = "; ".join(str(finding) for finding in more[:3])
        raise AuditError(
            f"The export can't be read as books: {words}",
            hint="Export again with `deepsquare audit export`.",
        )
    own = {id(finding) for finding in replayed.ledger.findings}
    others = [finding for finding in more if id(finding) not in own]
    report = _report(replayed.ledger, storage, others, block_hash, proven=False)
    # A chain that tells something else need not know these transactions.
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
    held = storage.balances.get(ledger.deployment.scheduler, 0) if storage is not None else None
    checks = conservation(
        ledger.totals,
        ledger.deployment,
        ledger.block,
        supply=storage.supply if storage is not None else None,
        scheduler_balance=held,
        live=[job.id for job in ledger.jobs.values() if job.status.is_live],
        parked=sorted(ledger.parked),
    )
    exceptions = tuple(ledger.exceptions)
    return AuditReport(audit, ledger, tuple(checks), exceptions, block_hash, proven)


async def _with_senders(contracts: Contracts, report: AuditReport) -> AuditReport:
    """Say of late assignments whether providers made them themselves, and whether they might."""
    late = [row for row in report.exceptions if row.code is Code.LATE_ASSIGNMENT]
    hashes = sorted({row.tx_hash for row in late})
    sent: dict[str, Any] = {}
    for at in range(0, len(hashes), _READS):
        some = hashes[at : at + _READS]
        asked = (contracts.w3.eth.get_transaction(HexBytes(each)) for each in some)
        sent |= zip(some, await asyncio.gather(*asked), strict=True)
    named = name_self_scheduled(
        report.exceptions, {each: str(found["from"]) for each, found in sent.items()}
    )
    own = interface("MetaScheduler").function("selfSchedule").selector
    taken = [row for row in late if bytes(sent[row.tx_hash]["input"])[:4] == own]
    audit = replace(
        report.audit,
        findings=(*report.audit.findings, *forbidden_self_scheduling(report.ledger, taken)),
    )
    return replace(report, audit=audit, exceptions=tuple(named))


def forbidden_self_scheduling(ledger: Ledger, taken: Iterable[Anomaly]) -> list[AuditFinding]:
    """Findings of jobs that providers assigned to themselves although their customers forbid it.

    Args:
        ledger: That knows the jobs.
        taken: Late assignments that calls of `selfSchedule` made.
    """
    return [
        AuditFinding(
            "flags",
            f"{row.account} assigned job {row.job_id} to itself, which its customer forbids",
            row.block,
            row.tx_hash,
            row.job_id,
        )
        for row in taken
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
    """An account's statement over a range, names of its jobs, and whether it ends at `balanceOf`.

    Raises:
        EndpointError: The node does not answer, or keeps no state of the last block.
    """
    with bars("Reading events") as progress:
        found = await read_chronicle(
            contracts.w3, contracts.deployment, to_block=last, progress=progress
        )
    ledger = found.ledger(contracts.deployment)
    statement = statement_of(ledger, account, first, found.to_block)
    held = 0
    # Before the deployment there is nobody to ask.
    if found.to_block >= contracts.deployment.block:
        held = await contracts.credit.balance_of(account, block_identifier=found.to_block)
    names = {row.job_id: ledger.jobs[row.job_id].name for row in statement.rows if row.job_id}
    return statement, names, closing_check(ledger, statement, held)


async def job_bill(contracts: Contracts, ledger: Ledger, job_id: int) -> JobBill:
    """A job's bill, with the seconds that its provider's own transaction reports."""
    job = ledger.jobs[job_id]
    reported = None
    if job.status.is_final and job.exit_code is not None:
        sent = await contracts.w3.eth.get_transaction(HexBytes(job.transitions[-1][2]))
        reported = reported_seconds(bytes(sent["input"]), job_id)
    return recompute_bill(job, now=ledger.time, reported=reported)


def reported_seconds(calldata: bytes, job_id: int) -> int | None:
    """Seconds that a call of `finish` reports of a job; None if it is no such call."""
    function = interface("MetaScheduler").function("finish")
    if calldata[:4] != function.selector:
        return None
    try:
        (reports,) = decode_values(function.inputs, calldata[4:])
    except AbiError:
        return None
    # A job that a batch names twice is ended by the first report of it.
    return next((int(report[1]) for report in reports if report[0] == job_id), None)
