"""The three contracts deployed and wired, with the people who use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eth_abi import encode
from eth_utils import keccak

from deepsquare_chain.job import JobStatus
from tests.support.evm import Chain, Contract, Receipt, load_artifact, person, private_key

# All different, so that a test can tell which of them ruled.
TIMES = {
    "claimTimeout": 100,
    "pendingTimeout": 200,
    "responseTimeout": 50,
    "responseBlocks": 7,
    "reportGrace": 3_600,
    "topUpNotice": 30,
}
FEE_BPS = 500
APPROVAL_PERIOD = 30 * 86_400
ADMIN_DELAY = 86_400
WEALTH = 10**20

HARDWARE = {"nodes": 4, "cpusPerNode": 8, "memPerNode": 8_000, "gpusPerNode": 2}
# Odd prices, so that every division would show.
PRICES = {"cpu": 1_000_003, "gpu": 5_000_011, "mem": 101}
TERMS: dict[str, Any] = {
    "amount": 10**10,
    "timeLimit": 600,
    "tasks": 2,
    "cpusPerTask": 3,
    "memPerCpu": 100,
    "gpus": 1,
    "retries": 1,
    "untilSpent": False,
    "objective": 0,
    "name": "a job",
    "uses": "gpu.model=h100",
}
# Of a job of TERMS at PRICES.
RATE = 6 * 1_000_003 + 5_000_011 + 600 * 101


def digest(number: int) -> bytes:
    """A definition digest."""
    return keccak(number.to_bytes(32, "big"))


def fee_of(cost: int, bps: int = FEE_BPS) -> int:
    return cost * bps // 10_000


@dataclass(frozen=True)
class Host:
    """A registered provider."""

    id: int
    account: str


class Grid:
    """Contracts, roles and money of one test."""

    def __init__(
        self,
        *,
        token: Mapping[str, Any] | None = None,
        fee_bps: int = FEE_BPS,
        times: Mapping[str, int] = TIMES,
    ) -> None:
        self.chain = Chain()
        self.admin = person("admin")
        self.meta = person("meta-scheduler")
        self.treasury = person("treasury")
        self.alice = person("alice")
        self.bob = person("bob")
        self.stranger = person("stranger")
        deploy = self.chain.deploy
        self.credit = deploy(
            token or load_artifact("Credit"), self.admin, ADMIN_DELAY, sender=self.admin
        )
        self.registry = deploy(
            load_artifact("ProviderRegistry"),
            self.admin,
            ADMIN_DELAY,
            APPROVAL_PERIOD,
            sender=self.admin,
        )
        self.scheduler = self.deploy_scheduler(fee_bps=fee_bps, times=times)
        self._grant(self.credit, "MINTER_ROLE", self.admin)
        self._grant(self.registry, "APPROVER_ROLE", self.admin)
        self._grant(self.scheduler, "METASCHEDULER_ROLE", self.meta)
        for customer in (self.alice, self.bob):
            self.fund(customer)

    def deploy_scheduler(
        self, *, fee_bps: int = FEE_BPS, times: Mapping[str, int] = TIMES, **changes: Any
    ) -> Contract:
        """A MetaScheduler, with other constructor arguments where given."""
        given = {
            "admin": self.admin,
            "delay": ADMIN_DELAY,
            "credit": self.credit.address,
            "registry": self.registry.address,
            "treasury": self.treasury,
        } | changes
        return self.chain.deploy(
            load_artifact("MetaScheduler"), *given.values(), fee_bps, times, sender=self.admin
        )

    def _grant(self, contract: Contract, role: str, who: str) -> None:
        contract.grantRole(getattr(contract, role)(), who, sender=self.admin)

    # ---------------------------------------------------------------- customers

    def fund(self, who: str, amount: int = WEALTH) -> None:
        """Credits and an unlimited allowance."""
        self.credit.mint(who, amount, sender=self.admin)
        self.credit.approve(self.scheduler.address, 2**256 - 1, sender=who)

    def request(self, count: int = 1, **changes: Any) -> dict[str, Any]:
        assert set(changes) <= set(TERMS)
        return {"terms": TERMS | changes, "definitions": [digest(n) for n in range(count)]}

    def submit(self, customer: str | None = None, **changes: Any) -> int:
        """One PENDING job; its id."""
        receipt = self.scheduler.submitJobs(
            [self.request(**changes)], sender=customer or self.alice
        )
        job_id: int = receipt.value
        return job_id

    def balance(self, who: str) -> int:
        amount: int = self.credit.balanceOf(who)
        return amount

    def permit(
        self, owner: str, value: int, *, nonce: int | None = None, deadline: int | None = None
    ) -> dict[str, Any]:
        """A permit of a person of the tests for the scheduler, signed."""
        names = ("alice", "bob", "stranger", "admin")
        key = next(private_key(name) for name in names if person(name) == owner)
        deadline = self.chain.now + 60 if deadline is None else deadline
        nonce = self.credit.nonces(owner) if nonce is None else nonce
        kinds = ["bytes32", "address", "address", "uint256", "uint256", "uint256"]
        typehash = keccak(
            text="Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
        )
        values = [typehash, owner, self.scheduler.address, value, nonce, deadline]
        message = b"\x19\x01" + self.credit.DOMAIN_SEPARATOR() + keccak(encode(kinds, values))
        signed = key.sign_msg_hash(keccak(message))
        return {
            "value": value,
            "deadline": deadline,
            "v": signed.v + 27,
            "r": signed.r.to_bytes(32, "big"),
            "s": signed.s.to_bytes(32, "big"),
        }

    # ---------------------------------------------------------------- providers

    def register(
        self,
        account: str,
        hardware: Mapping[str, int] = HARDWARE,
        prices: Mapping[str, int] = PRICES,
        labels: Iterable[str] = (),
    ) -> int:
        """Hardware put forward for approval; its version."""
        version: int = self.registry.register(hardware, prices, list(labels), sender=account).value
        return version

    def provider(self, name: str = "provider", **given: Any) -> Host:
        """A provider in good standing, with all of its hardware on offer."""
        account = person(name)
        version = self.register(account, **given)
        self.registry.approve(account, version, sender=self.admin)
        return Host(self.registry.idOf(account), account)

    def report(
        self,
        job_id: int,
        seconds: int = 0,
        exit_code: int = 0,
        result: bytes = b"",
        reason: bytes = b"",
    ) -> dict[str, Any]:
        return {
            "jobId": job_id,
            "secondsUsed": seconds,
            "exitCode": exit_code,
            "result": result.ljust(32, b"\0"),
            "reason": reason.ljust(32, b"\0"),
        }

    # ------------------------------------------------------------ steps of a job

    def job(self, job_id: int) -> Any:
        return self.scheduler.getJob(job_id)

    def status(self, job_id: int) -> JobStatus:
        return JobStatus(self.job(job_id).status)

    def assign(self, host: Host, *job_ids: int) -> Receipt:
        assignment = {"providerId": host.id, "jobIds": list(job_ids)}
        receipt: Receipt = self.scheduler.metaSchedule([assignment], sender=self.meta)
        return receipt

    def assigned(self, host: Host, **terms: Any) -> int:
        """A META_SCHEDULED job."""
        job_id = self.submit(**terms)
        self.assign(host, job_id)
        return job_id

    def claimed(self, host: Host, **terms: Any) -> int:
        """A SCHEDULED job."""
        job_id = self.assigned(host, **terms)
        self.scheduler.claim([job_id], sender=host.account)
        return job_id

    def running(self, host: Host, **terms: Any) -> int:
        """A RUNNING job that starts now."""
        job_id = self.claimed(host, **terms)
        self.scheduler.start([job_id], sender=host.account)
        return job_id

    def finish(self, host: Host, job_id: int, seconds: int, exit_code: int = 0) -> Receipt:
        receipt: Receipt = self.scheduler.finish(
            [self.report(job_id, seconds, exit_code)], sender=host.account
        )
        return receipt

    def silence(self, host: Host, job_id: int) -> None:
        """A challenge that the provider leaves unanswered, until it counts as silent."""
        self.scheduler.challenge(job_id, sender=self.stranger)
        self.chain.advance(TIMES["responseTimeout"] + 1, TIMES["responseBlocks"] + 1)
        assert self.scheduler.isSilent(host.id)

    def in_status(self, status: JobStatus, host: Host, **terms: Any) -> int:
        """A job brought into a status on its usual way."""
        if status is JobStatus.NONE:
            return self.scheduler.jobCount() + 1_000
        makers = {
            JobStatus.PENDING: lambda: self.submit(**terms),
            JobStatus.META_SCHEDULED: lambda: self.assigned(host, **terms),
            JobStatus.SCHEDULED: lambda: self.claimed(host, **terms),
        }
        if status in makers:
            return makers[status]()
        job_id = self.running(host, **terms)
        if status is JobStatus.CANCELLED:
            self.scheduler.cancel([job_id], sender=self.job(job_id).customer)
        elif status is JobStatus.PANICKED:
            self.scheduler.panic([job_id], "", sender=host.account)
        elif status is not JobStatus.RUNNING:
            spent = status is JobStatus.OUT_OF_CREDITS
            self.chain.advance(TERMS["timeLimit"] if spent else 1)
            seconds = TERMS["timeLimit"] if spent else 1
            self.finish(host, job_id, seconds, 3 if status is JobStatus.FAILED else 0)
        assert self.status(job_id) is status
        return job_id
