"""The deployed contracts with their roles, customers and providers, on the in-process EVM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eth_abi import encode
from eth_utils import keccak

from deepsquare_chain.job import JobStatus
from tests.support.evm import Chain, Contract, Receipt, load_artifact, person, sign

# All different, so that a test can see which of them applied.
TIMES = {
    "claimTimeout": 100,
    "pendingTimeout": 200,
    "pendingExpiry": 2_000,
    "responseTimeout": 50,
    "responseBlocks": 7,
    "lostTimeout": 150,
    "reportGrace": 3_600,
    "topUpNotice": 30,
    "collectInterval": 120,
}
FEE_BPS = 500
# Gas limit of forwarded calls; more than any single call of the tests needs.
FORWARDED_GAS = 20_000_000
DOMAIN_TYPE = keccak(
    text="EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
REQUEST_TYPE = keccak(
    text="ForwardRequest(address from,address to,uint256 value,uint256 gas,uint256 nonce,"
    "uint48 deadline,bytes data)"
)
APPROVAL_PERIOD = 30 * 86_400
ADMIN_DELAY = 86_400
WEALTH = 10**20

HARDWARE = {"nodes": 4, "cpusPerNode": 8, "memPerNode": 8_000, "gpusPerNode": 2}
# Odd prices, so that a wrong division becomes visible.
PRICES = {"cpu": 1_000_003, "gpu": 5_000_011, "mem": 101}
# Maximum prices that no provider can exceed.
ANY_PRICES = dict.fromkeys(PRICES, 2**64 - 1)
# Flags of a job's terms; only the contract sets SUCCESSOR.
UNTIL_SPENT, NO_SELF_SCHEDULING, INTERIM_PAYMENTS, SUCCESSOR = 1, 2, 4, 128
TERMS: dict[str, Any] = {
    "amount": 10**10,
    "timeLimit": 600,
    "tasks": 2,
    "cpusPerTask": 3,
    "memPerCpu": 100,
    "gpus": 1,
    "retries": 1,
    "flags": 0,
    "objective": 0,
    "name": "a job",
    "uses": "gpu.model=h100",
}
# Rate of a job with TERMS at PRICES.
RATE = 6 * 1_000_003 + 5_000_011 + 600 * 101


def digest(number: int) -> bytes:
    """Return the digest of a made-up definition."""
    return keccak(number.to_bytes(32, "big"))


def fee_of(cost: int, bps: int = FEE_BPS) -> int:
    return cost * bps // 10_000


def assignment(
    provider_id: int, *job_ids: int, prices: Mapping[str, int] = ANY_PRICES
) -> dict[str, Any]:
    """Return one group of an assignment; by default, any prices are accepted."""
    return {"providerId": provider_id, "prices": prices, "jobIds": list(job_ids)}


def sign_typed(signer: str, domain: bytes, struct: bytes) -> tuple[int, bytes, bytes]:
    """Sign an EIP-712 struct with a test account; return v, r and s."""
    return sign(signer, keccak(b"\x19\x01" + domain + keccak(struct)))


@dataclass(frozen=True)
class Host:
    """A registered provider."""

    id: int
    account: str


class Grid:
    """The contracts, roles and credits of one test."""

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
        self.forwarder = deploy(load_artifact("ERC2771Forwarder"), "DeepSquare", sender=self.admin)
        self.scheduler = self.deploy_scheduler(fee_bps=fee_bps, times=times)
        self._grant(self.credit, "MINTER_ROLE", self.admin)
        self._grant(self.registry, "APPROVER_ROLE", self.admin)
        self._grant(self.scheduler, "METASCHEDULER_ROLE", self.meta)
        for customer in (self.alice, self.bob):
            self.fund(customer)

    def deploy_scheduler(
        self, *, fee_bps: int = FEE_BPS, times: Mapping[str, int] = TIMES, **changes: Any
    ) -> Contract:
        """Deploy a MetaScheduler; `changes` replace constructor arguments."""
        arguments = {
            "admin": self.admin,
            "delay": ADMIN_DELAY,
            "credit": self.credit.address,
            "registry": self.registry.address,
            "treasury": self.treasury,
            "forwarder": self.forwarder.address,
        } | changes
        return self.chain.deploy(
            load_artifact("MetaScheduler"), *arguments.values(), fee_bps, times, sender=self.admin
        )

    def _grant(self, contract: Contract, role: str, account: str) -> None:
        contract.grantRole(getattr(contract, role)(), account, sender=self.admin)

    # ---------------------------------------------------------------- customers

    def fund(self, account: str, amount: int = WEALTH) -> None:
        """Give an account credits and an unlimited allowance for the scheduler."""
        self.credit.mint(account, amount, sender=self.admin)
        self.credit.approve(self.scheduler.address, 2**256 - 1, sender=account)

    def request(self, count: int = 1, **changes: Any) -> dict[str, Any]:
        assert set(changes) <= set(TERMS)
        return {"terms": TERMS | changes, "definitions": [digest(n) for n in range(count)]}

    def submit(self, customer: str | None = None, **changes: Any) -> int:
        """Submit one PENDING job, and return its ID."""
        receipt = self.scheduler.submitJobs(
            [self.request(**changes)], sender=customer or self.alice
        )
        job_id: int = receipt.value
        return job_id

    def balance(self, account: str) -> int:
        amount: int = self.credit.balanceOf(account)
        return amount

    def permit(
        self, owner: str, value: int, *, nonce: int | None = None, deadline: int | None = None
    ) -> dict[str, Any]:
        """Return a permit for the scheduler, signed by a test account."""
        deadline = self.chain.now + 60 if deadline is None else deadline
        nonce = self.credit.nonces(owner) if nonce is None else nonce
        kinds = ["bytes32", "address", "address", "uint256", "uint256", "uint256"]
        typehash = keccak(
            text="Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
        )
        values = [typehash, owner, self.scheduler.address, value, nonce, deadline]
        struct = encode(kinds, values)
        v, r, s = sign_typed(owner, self.credit.DOMAIN_SEPARATOR(), struct)
        return {"value": value, "deadline": deadline, "v": v, "r": r, "s": s}

    # ------------------------------------------------------ gasless calls of customers

    def signed_request(
        self, signer: str, name: str, *values: Any, **changes: Any
    ) -> dict[str, Any]:
        """Return a customer's call of the scheduler as a signed ERC-2771 request.

        `changes` replace fields before signing; `signed_by` names another account that signs.
        """
        key_owner = changes.pop("signed_by", signer)
        nonce = changes.pop("nonce", None)
        request = {
            "from": signer,
            "to": self.scheduler.address,
            "value": 0,
            "gas": FORWARDED_GAS,
            "deadline": self.chain.now + 60,
            "data": getattr(self.scheduler, name).encode(*values),
        } | changes
        nonce = self.forwarder.nonces(signer) if nonce is None else nonce
        struct = encode(
            ["bytes32", "address", "address", *["uint256"] * 3, "uint48", "bytes32"],
            [
                REQUEST_TYPE,
                *(request[field] for field in ("from", "to", "value", "gas")),
                nonce,
                request["deadline"],
                keccak(request["data"]),
            ],
        )
        v, r, s = sign_typed(key_owner, self.forwarder_domain(), struct)
        return request | {"signature": r + s + bytes([v])}

    def forwarder_domain(self) -> bytes:
        """Return the forwarder's EIP-712 domain separator, computed from its ERC-5267 fields."""
        _, name, version, chain_id, contract, _, _ = self.forwarder.eip712Domain()
        return keccak(
            encode(
                ["bytes32"] * 3 + ["uint256", "address"],
                [DOMAIN_TYPE, keccak(text=name), keccak(text=version), chain_id, contract],
            )
        )

    def forward(self, signer: str, name: str, *values: Any) -> Receipt:
        """Send a customer's call through the forwarder, from another account."""
        receipt: Receipt = self.forwarder.execute(
            self.signed_request(signer, name, *values), sender=self.stranger
        )
        return receipt

    # ---------------------------------------------------------------- providers

    def register(
        self,
        account: str,
        hardware: Mapping[str, int] = HARDWARE,
        prices: Mapping[str, int] = PRICES,
        labels: Iterable[str] = (),
    ) -> int:
        """Propose hardware for approval, and return its version."""
        version: int = self.registry.register(hardware, prices, list(labels), sender=account).value
        return version

    def provider(self, name: str = "provider", **options: Any) -> Host:
        """Return an approved provider that offers all of its hardware."""
        account = person(name)
        version = self.register(account, **options)
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
        receipt: Receipt = self.scheduler.metaSchedule(
            [assignment(host.id, *job_ids)], sender=self.meta
        )
        return receipt

    def assigned(self, host: Host, **terms: Any) -> int:
        """Return a META_SCHEDULED job."""
        job_id = self.submit(**terms)
        self.assign(host, job_id)
        return job_id

    def claimed(self, host: Host, **terms: Any) -> int:
        """Return a SCHEDULED job."""
        job_id = self.assigned(host, **terms)
        self.scheduler.claim([job_id], sender=host.account)
        return job_id

    def running(self, host: Host, **terms: Any) -> int:
        """Return a RUNNING job that starts now."""
        job_id = self.claimed(host, **terms)
        self.scheduler.start([job_id], sender=host.account)
        return job_id

    def finish(self, host: Host, job_id: int, seconds: int, exit_code: int = 0) -> Receipt:
        receipt: Receipt = self.scheduler.finish(
            [self.report(job_id, seconds, exit_code)], sender=host.account
        )
        return receipt

    def silence(self, host: Host, job_id: int) -> None:
        """Challenge the provider without an answer, until it counts as silent."""
        self.scheduler.challenge(job_id, sender=self.stranger)
        self.chain.advance(TIMES["responseTimeout"] + 1, TIMES["responseBlocks"] + 1)
        assert self.scheduler.isSilent(host.id)

    def abandon(self, host: Host, job_id: int) -> None:
        """Challenge the provider without an answer, until its runs count as lost."""
        self.silence(host, job_id)
        self.chain.advance(TIMES["lostTimeout"] - TIMES["responseTimeout"])

    def in_status(self, status: JobStatus, host: Host, **terms: Any) -> int:
        """Bring a job to a status by its usual transitions."""
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
