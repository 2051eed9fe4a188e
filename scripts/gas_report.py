#!/usr/bin/env python3
"""Measure the gas of every step of a job's life cycle on a real node (anvil), in the steady state.

Steady state: unlimited allowance, other live jobs, every party paid before, each job with a name and
one requirement. Values are the gas used by receipts; `per_job` is the gas of a batch divided by its
jobs. A life cycle has five steps, unless its name says otherwise: submit, metaSchedule, claim, start,
finish.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any, cast

from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_typing import ChecksumAddress
from web3 import HTTPProvider, Web3
from web3.contract import Contract
from web3.types import TxReceipt

from deepsquare_chain.devnet.node.base import Anvil
from deepsquare_chain.errors import GridError

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / "deepsquare_chain" / "chain" / "bindings" / "artifacts"
TABLE = ROOT / "docs" / "gas.json"
CREDIT = 10**18
BATCH = 50
EXITED = b"exited".ljust(32, b"\0")
# Seconds, within the bounds of the contract; they do not affect the gas.
TIMEOUTS = (300, 600, 30 * 86_400, 300, 10, 1800, 3600, 60, 60)
PRICES = (10**14, 10**16, 10**9)
INTERIM_PAYMENTS = 4
# Upper limits in gas, by the path of the value in the report.
HOLD = {
    "life.four": 315_000,
    "life.five": 346_000,
    "batch50.one_customer": 185_000,
    "batch50.distinct_customers": 193_000,
    "array50.per_job": 141_000,
    "array50.per_job_same": 134_000,
    "collect50.per_job": 17_000,
    "relayed50.per_job": 180_000,
}


class Bench:
    """A deployed grid with customers, one scheduler and two providers."""

    def __init__(self, w3: Web3) -> None:
        self.w3 = w3
        (self.admin, self.scheduler, self.customer, self.provider, self.second, self.treasury) = (
            w3.eth.accounts[:6]
        )
        self.stranger = w3.eth.accounts[6]
        # Accounts with known keys: they sign forwarded requests, and have no coins until funded.
        self.others: list[LocalAccount] = [
            Account.from_key(Web3.keccak(text=f"customer {number}")) for number in range(BATCH)
        ]
        self.serial = 0
        self.credit = self.deploy("Credit", self.admin, 0)
        self.registry = self.deploy("ProviderRegistry", self.admin, 0, 365 * 86_400)
        self.forwarder = self.deploy("ERC2771Forwarder", "DeepSquare")
        self.grid = self.deploy(
            "MetaScheduler",
            self.admin,
            0,
            self.credit.address,
            self.registry.address,
            self.treasury,
            self.forwarder.address,
            500,
            TIMEOUTS,
        )
        self.gas: dict[str, int] = {}
        for contract, role, holder in (
            (self.credit, "MINTER_ROLE", self.admin),
            (self.registry, "APPROVER_ROLE", self.admin),
            (self.grid, "METASCHEDULER_ROLE", self.scheduler),
        ):
            self.send(
                contract.functions.grantRole(contract.functions[role]().call(), holder), self.admin
            )
        self.send(self.credit.functions.mint(self.customer, 10**6 * CREDIT), self.admin)
        self.send(self.credit.functions.approve(self.grid.address, 2**256 - 1), self.customer)
        for account in self.others:
            self.send(self.credit.functions.mint(account.address, 1000 * CREDIT), self.admin)
            w3.provider.make_request("anvil_impersonateAccount", [account.address])  # type: ignore[arg-type]
            self.fund(account, 10**18)
            approve = self.credit.functions.approve(self.grid.address, 2**256 - 1)
            self.send(approve, account.address)
        self.gas["register"] = 0
        for provider in (self.provider, self.second):
            self.gas["register"] = self.send(
                self.registry.functions.register(
                    (1000, 64, 262_144, 8),
                    PRICES,
                    ["gpu.model=h100", "compute.gflops=2000", "region=eu"],
                ),
                provider,
            )
            self.send(self.registry.functions.approve(provider, 1), self.admin)

    def deploy(self, name: str, *arguments: Any) -> Contract:
        artifact = json.loads((ARTIFACTS / f"{name}.json").read_text(encoding="utf-8"))
        factory = self.w3.eth.contract(abi=artifact["abi"], bytecode=artifact["bytecode"])
        receipt = self.receipt(factory.constructor(*arguments).transact({"from": self.admin}))
        # The receipt of a creation always has an address; the type also covers calls.
        address = cast("ChecksumAddress", receipt["contractAddress"])
        return self.w3.eth.contract(address=address, abi=artifact["abi"])

    def receipt(self, tx_hash: Any) -> TxReceipt:
        receipt = self.w3.eth.wait_for_transaction_receipt(tx_hash, poll_latency=0.01)
        if receipt["status"] != 1:
            sys.exit(f"Transaction {receipt['transactionHash'].to_0x_hex()} reverted.")
        return receipt

    def send(self, function: Any, sender: str) -> int:
        """Send a call, and return the gas used."""
        tx = function.transact({"from": sender, "gas": 16_000_000})
        return self.receipt(tx)["gasUsed"]

    def fund(self, account: LocalAccount, coin: int) -> None:
        """Set the balance of an account in wei."""
        parameters: Any = [account.address, hex(coin)]
        self.w3.provider.make_request("anvil_setBalance", parameters)  # type: ignore[arg-type]

    def advance(self, seconds: int) -> None:
        self.w3.provider.make_request("evm_increaseTime", [seconds])  # type: ignore[arg-type]
        self.w3.provider.make_request("evm_mine", [])  # type: ignore[arg-type]

    def terms(self, retries: int = 0, flags: int = 0) -> tuple[Any, ...]:
        self.serial += 1
        name = f"job-{self.serial:05d}"
        return (CREDIT, 600, 2, 2, 512, 0, retries, flags, 0, name, "gpu.model=h100")

    def definition(self) -> bytes:
        self.serial += 1
        return bytes(Web3.keccak(text=str(self.serial)))

    def submit(self, requests: list[Any], customer: str | None = None) -> tuple[int, list[int]]:
        """Submit jobs; return the gas used and the job IDs."""
        first = self.grid.functions.jobCount().call() + 1
        gas = self.send(self.grid.functions.submitJobs(requests), customer or self.customer)
        return gas, list(range(first, self.grid.functions.jobCount().call() + 1))

    def one(self, retries: int = 0, flags: int = 0, customer: str | None = None) -> tuple[int, int]:
        gas, ids = self.submit([(self.terms(retries, flags), [self.definition()])], customer)
        return gas, ids[0]

    def assign(self, ids: list[int], provider_id: int = 1) -> int:
        assignment = (provider_id, PRICES, ids)
        return self.send(self.grid.functions.metaSchedule([assignment]), self.scheduler)

    def claim(self, ids: list[int], provider: str | None = None) -> int:
        return self.send(self.grid.functions.claim(ids), provider or self.provider)

    def start(self, ids: list[int], provider: str | None = None) -> int:
        return self.send(self.grid.functions.start(ids), provider or self.provider)

    def claim_and_start(self, ids: list[int]) -> int:
        return self.send(self.grid.functions.claimAndStart(ids), self.provider)

    def finish(self, ids: list[int], provider: str | None = None) -> int:
        self.advance(60)
        reports = [(job, 42, 0, self.definition(), EXITED) for job in ids]
        return self.send(self.grid.functions.finish(reports), provider or self.provider)

    def running(self, retries: int = 0, flags: int = 0) -> int:
        job = self.one(retries, flags)[1]
        self.assign([job])
        self.claim_and_start([job])
        return job

    def forward_request(self, account: LocalAccount, data: str) -> tuple[Any, ...]:
        """Return a customer's signed request for the forwarder: one call of the meta-scheduler."""
        gas, deadline = 1_000_000, 2**48 - 1
        message = {
            "from": account.address,
            "to": self.grid.address,
            "value": 0,
            "gas": gas,
            "nonce": self.forwarder.functions.nonces(account.address).call(),
            "deadline": deadline,
            "data": data,
        }
        fields = ("address from", "address to", "uint256 value", "uint256 gas", "uint256 nonce")
        fields += ("uint48 deadline", "bytes data")
        types = [dict(zip(("type", "name"), field.split(), strict=True)) for field in fields]
        domain = {
            "name": "DeepSquare",
            "version": "1",
            "chainId": self.w3.eth.chain_id,
            "verifyingContract": self.forwarder.address,
        }
        signed = account.sign_typed_data(domain, {"ForwardRequest": types}, message)
        return (account.address, self.grid.address, 0, gas, deadline, data, signed.signature)


def life(bench: Bench, ids: list[int]) -> int:
    """Return the gas of all steps after the submission, in four transactions."""
    return bench.assign(ids) + bench.claim(ids) + bench.start(ids) + bench.finish(ids)


def short_life(bench: Bench, ids: list[int]) -> int:
    """Return the gas of all steps after the submission, in three transactions with `claimAndStart`."""
    return bench.assign(ids) + bench.claim_and_start(ids) + bench.finish(ids)


def whole_lives(bench: Bench) -> dict[str, int]:
    """Return the gas of a life cycle in five transactions, and in four with `claimAndStart`."""
    submit, job = bench.one()
    five = submit + life(bench, [job])
    submit, job = bench.one()
    four = submit + short_life(bench, [job])
    return {"four": four, "five": five}


def batches(bench: Bench) -> dict[str, int]:
    """Return the gas per job if jobs are submitted singly, and then processed in batches."""
    gas: dict[str, int] = {}
    for name, customers in (
        ("one_customer", [bench.customer] * BATCH),
        ("distinct_customers", [account.address for account in bench.others]),
    ):
        for suffix, process in (("", life), ("_claim_and_start", short_life)):
            batch = [bench.one(customer=customer) for customer in customers]
            total = sum(gas_used for gas_used, _ in batch) + process(
                bench, [job for _, job in batch]
            )
            gas[name + suffix] = total // BATCH
    return gas


def arrays(bench: Bench) -> dict[str, int]:
    """Return the gas per job of 50 jobs in one submission, with different or with the same terms."""
    gas, ids = bench.submit([(bench.terms(), [bench.definition()]) for _ in range(BATCH)])
    distinct = (gas + life(bench, ids)) // BATCH
    gas, ids = bench.submit([(bench.terms(), [bench.definition() for _ in range(BATCH)])])
    return {"per_job": distinct, "per_job_same": (gas + life(bench, ids)) // BATCH}


def collections(bench: Bench) -> dict[str, int]:
    """Return the gas per job of interim payments in one batch."""
    _, ids = bench.submit(
        [(bench.terms(flags=INTERIM_PAYMENTS), [bench.definition()]) for _ in range(BATCH)]
    )
    bench.assign(ids)
    bench.claim_and_start(ids)
    bench.advance(120)
    collect = bench.grid.functions.collect(ids)
    gas = {"per_job": bench.send(collect, bench.provider) // BATCH}
    bench.finish(ids)
    return gas


def relayed(bench: Bench) -> dict[str, int]:
    """Return the gas per job of 50 signed submissions in one transaction, then in batches of 50."""
    # The steady state of a forwarder: each customer has sent a request before.
    gas = 0
    for _ in range(2):
        first = bench.grid.functions.jobCount().call() + 1
        requests = [
            bench.forward_request(
                account,
                bench.grid.encode_abi("submitJobs", args=[[(bench.terms(), [bench.definition()])]]),
            )
            for account in bench.others
        ]
        execute = bench.forwarder.functions.executeBatch(requests, bench.stranger)
        gas = bench.send(execute, bench.stranger)
    ids = list(range(first, first + BATCH))
    return {"submit_per_job": gas // BATCH, "per_job": (gas + life(bench, ids)) // BATCH}


def measure(w3: Web3) -> dict[str, Any]:
    """Return the whole report; see the module's docstring for the steady state."""
    bench = Bench(w3)
    # Both providers, the treasury and the customer have been paid, and other jobs stay live.
    for provider_id, provider in ((1, bench.provider), (2, bench.second)):
        job = bench.one()[1]
        bench.assign([job], provider_id)
        bench.claim([job], provider)
        bench.start([job], provider)
        bench.finish([job], provider)
    for _ in range(3):
        bench.running()
    report: dict[str, Any] = {}
    submit, job = bench.one()
    report["single"] = {
        "submit": submit,
        "meta_schedule": bench.assign([job]),
        "claim": bench.claim([job]),
        "start": bench.start([job]),
        "finish": bench.finish([job]),
    }
    job = bench.one()[1]
    bench.assign([job])
    report["single"]["claim_and_start"] = bench.claim_and_start([job])
    report["life"] = whole_lives(bench)
    report["batch50"] = batches(bench)
    report["array50"] = arrays(bench)
    report["collect50"] = collections(bench)
    report["relayed50"] = relayed(bench)
    report["cancel"] = cancels(bench)
    job = bench.running()
    top_up = bench.grid.functions.topUp(job, bench.customer, CREDIT)
    report["top_up"] = bench.send(top_up, bench.customer)
    job = bench.one()[1]
    bench.assign([job])
    report["requeue"] = bench.send(bench.grid.functions.requeue([job], ""), bench.provider)
    job = bench.running()
    report["panic"] = bench.send(bench.grid.functions.panic([job], ""), bench.provider)
    job = bench.running(retries=1)
    report["panic_successor"] = bench.send(bench.grid.functions.panic([job], ""), bench.provider)
    job = bench.running(flags=INTERIM_PAYMENTS)
    bench.advance(120)
    report["collect"] = bench.send(bench.grid.functions.collect([job]), bench.provider)
    job = bench.running()
    report["challenge"] = bench.send(bench.grid.functions.challenge(job), bench.stranger)
    report["answer"] = bench.send(bench.grid.functions.answer(), bench.provider)
    report["register"] = bench.gas["register"]
    return report


def cancels(bench: Bench) -> dict[str, int]:
    """Return the gas of a cancellation from PENDING, META_SCHEDULED and RUNNING."""
    gas: dict[str, int] = {}
    job = bench.one()[1]
    gas["pending"] = bench.send(bench.grid.functions.cancel([job]), bench.customer)
    job = bench.one()[1]
    bench.assign([job])
    gas["meta_scheduled"] = bench.send(bench.grid.functions.cancel([job]), bench.customer)
    job = bench.running()
    bench.advance(30)
    gas["running"] = bench.send(bench.grid.functions.cancel([job]), bench.customer)
    return gas


def headline(report: dict[str, Any]) -> dict[str, int]:
    """Return the values that have limits, by their path in the report."""
    figures: dict[str, int] = {}
    for path in HOLD:
        group, name = path.split(".")
        figures[path] = report[group][name]
    return figures


async def run() -> dict[str, Any]:
    """Measure on a new node, and return the report; raises ``NotFoundError`` without anvil."""
    # With a fixed genesis, addresses and so the gas of calldata are the same in each run.
    options = ("--timestamp", "1767225600")
    async with Anvil(block_time=None, options=options) as node:
        return await asyncio.to_thread(measure, Web3(HTTPProvider(node.url)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    try:
        report = asyncio.run(run())
    except GridError as error:
        sys.exit(f"{error.message} {error.hint}")
    text = json.dumps(report, indent=2)
    if options.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        for name, value in report.items():
            print(f"{name:16} {value}")
    for name, value in headline(report).items():
        if value > HOLD[name]:
            sys.exit(f"{name}: {value} gas is more than the {HOLD[name]} that must hold.")


if __name__ == "__main__":
    main()
