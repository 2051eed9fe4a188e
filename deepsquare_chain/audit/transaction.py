"""The transaction being replayed: its position, the payments it owes, and its findings."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from deepsquare_chain.audit.entries import AuditFinding, LedgerEntry, MovementKind


@dataclass(slots=True)
class TransactionContext:
    """The context of one transaction during a replay.

    Attributes:
        owed_in: Credit-wei that each account must pay to the scheduler. At the end of the
            transaction, `owed_in` and `owed_out` are matched with the token's transfers.
        owed_out: Credit-wei that the scheduler must pay to each account.
        ended: Jobs that became final but were not yet settled or succeeded by a retry.
        awaited: Events that must still follow a transition: job ID and event name.
        unanswered: Providers that moved a job (the value) while a challenge was open, which
            must answer the challenge.
        left: Former providers of jobs that returned to PENDING, by job.
    """

    block: int
    time: int
    tx_hash: str
    findings: list[AuditFinding]
    entries: list[LedgerEntry]
    owed_in: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    owed_out: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    ended: dict[int, int] = field(default_factory=dict)
    awaited: set[tuple[int, str]] = field(default_factory=set)
    unanswered: dict[str, int] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    log_index: int = 0

    def find(self, code: str, message: str, job_id: int = 0) -> None:
        """Record a finding."""
        self.findings.append(AuditFinding(code, message, self.block, self.tx_hash, job_id))

    def check(self, holds: bool, code: str, message: str, job_id: int = 0) -> None:
        """Record a finding unless `holds` is true."""
        if not holds:
            self.find(code, message, job_id)

    def enter(
        self, account: str, kind: MovementKind, amount: int, counterparty: str, job_id: int = 0
    ) -> None:
        """Record a movement of an account. An amount of zero is not recorded."""
        if amount:
            self.entries.append(
                LedgerEntry(
                    account,
                    self.block,
                    self.time,
                    kind,
                    amount,
                    job_id,
                    counterparty,
                    self.tx_hash,
                    self.log_index,
                )
            )
