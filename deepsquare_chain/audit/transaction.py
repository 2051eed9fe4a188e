"""The transaction that a replay is reading: its place, what it owes, and what was found in it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from deepsquare_chain.audit.entries import AuditFinding, LedgerEntry, MovementKind


@dataclass(slots=True)
class TransactionContext:
    """One transaction.

    `owed_in` is what accounts must pay to the scheduler in it, `owed_out` what the scheduler must
    pay; both are matched with the token's transfers once the transaction is read. `ended` holds
    the jobs that became final and have not been settled or carried on yet, `awaited` the events
    that must still follow a move, by job. `unanswered` are providers that moved a job while a
    challenge was open, which answers it, with that job; `left` are the providers that jobs were
    taken from, by job.
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
        """Note what can't be."""
        self.findings.append(AuditFinding(code, message, self.block, self.tx_hash, job_id))

    def check(self, holds: bool, code: str, message: str, job_id: int = 0) -> None:
        """Note it unless it holds."""
        if not holds:
            self.find(code, message, job_id)

    def enter(
        self, account: str, kind: MovementKind, amount: int, counterparty: str, job_id: int = 0
    ) -> None:
        """Write a movement of an account; nothing is written for nothing."""
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
