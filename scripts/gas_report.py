#!/usr/bin/env python3
"""Measure the gas of every step of a job's life on a real node (anvil), in the steady state.

Steady state: unlimited allowance, other jobs live, every party paid before, each job with a name and one
affinity. Gas is what receipts say, in units of gas; `per_job` divides a batch's by its jobs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any, cast

from eth_typing import ChecksumAddress
from web3 import HTTPProvider, Web3
from web3.contract import Contract
from web3.types import TxReceipt

from deepsquare_chain.devnet.anvil import Anvil
from deepsquare_chain.errors import GridError

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / "deepsquare_chain" / "chain" / "artifacts"
TABLE = ROOT / "docs" / "gas.json"
CREDIT = 10**18
BATCH = 50
EXITED = b"exited".ljust(32, b"\0")
# Seconds; the bounds of the contract allow them, and none of them changes a cost.
TIMEOUTS = (300, 600, 300, 10, 3600, 60)
HOLD = {"single": 330_000, "batch50": 190_000, "array50": 145_000, "array50_same": 135_000}


class Bench:
    """A deployed grid with one customer, one scheduler and two providers."""

    def __init__(self, w3: Web3) -> None:
        self.w3 = w3
        (self.admin, self.scheduler, self.customer, self.provider, self.second, self.treasury) = (
            w3.eth.accounts[:6]
        )
        self.stranger = w3.eth.accounts[6]
        self.serial = 0
        self.credit = self.deploy("Credit", self.admin, 0)
        self.registry = self.deploy("ProviderRegistry", self.admin, 0, 365 * 86_400)
        self.grid = self.deploy(
            "MetaScheduler",
            self.admin,
            0,
            self.credit.address,
            self.registry.address,
            self.treasury,
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
        self.gas["register"] = 0
        for provider in (self.provider, self.second):
            self.gas["register"] = self.send(
                self.registry.functions.register(
                    (1000, 64, 262_144, 8),
                    (10**14, 10**16, 10**9),
                    ["gpu.model=h100", "compute.gflops=2000", "region=eu"],
                ),
                provider,
            )
            self.send(self.registry.functions.approve(provider, 1), self.admin)

    def deploy(self, name: str, *arguments: Any) -> Contract:
        artifact = json.loads((ARTIFACTS / f"{name}.json").read_text(encoding="utf-8"))
        factory = self.w3.eth.contract(abi=artifact["abi"], bytecode=artifact["bytecode"])
        receipt = self.receipt(factory.constructor(*arguments).transact({"from": self.admin}))
        # A creation's receipt always names the contract; the type allows for calls as well.
        address = cast("ChecksumAddress", receipt["contractAddress"])
        return self.w3.eth.contract(address=address, abi=artifact["abi"])

    def receipt(self, tx_hash: Any) -> TxReceipt:
        receipt = self.w3.eth.wait_for_transaction_receipt(tx_hash, poll_latency=0.01)
        if receipt["status"] != 1:
            sys.exit(f"Transaction {receipt['transactionHash'].to_0x_hex()} reverted.")
        return receipt

    def send(self, function: Any, sender: str) -> int:
        """Gas used by one call."""
        tx = function.transact({"from": sender, "gas": 16_000_000})
        return self.receipt(tx)["gasUsed"]

    def advance(self, seconds: int) -> None:
        self.w3.provider.make_request("evm_increaseTime", [seconds])  # type: ignore[arg-type]
        self.w3.provider.make_request("evm_mine", [])  # type: ignore[arg-type]

    def terms(self, retries: int = 0) -> tuple[Any, ...]:
        self.serial += 1
        name = f"job-{self.serial:05d}"
        return (CREDIT, 600, 2, 2, 512, 0, retries, False, 0, name, "gpu.model=h100")

    def definition(self) -> bytes:
        self.serial += 1
        return bytes(Web3.keccak(text=str(self.serial)))

    def submit(self, requests: list[Any]) -> tuple[int, list[int]]:
        """Gas of one submission, and the ids that it made."""
        first = self.grid.functions.jobCount().call() + 1
        gas = self.send(self.grid.functions.submitJobs(requests), self.customer)
        return gas, list(range(first, self.grid.functions.jobCount().call() + 1))

    def one(self, retries: int = 0) -> tuple[int, int]:
        gas, ids = self.submit([(self.terms(retries), [self.definition()])])
        return gas, ids[0]

    def assign(self, ids: list[int], provider_id: int = 1) -> int:
        return self.send(self.grid.functions.metaSchedule([(provider_id, ids)]), self.scheduler)

    def claim(self, ids: list[int], provider: str | None = None) -> int:
        return self.send(self.grid.functions.claim(ids), provider or self.provider)

    def start(self, ids: list[int], provider: str | None = None) -> int:
        return self.send(self.grid.functions.start(ids), provider or self.provider)

    def finish(self, ids: list[int], provider: str | None = None) -> int:
        self.advance(60)
        reports = [(job, 42, 0, self.definition(), EXITED) for job in ids]
        return self.send(self.grid.functions.finish(reports), provider or self.provider)

    def running(self, retries: int = 0) -> int:
        job = self.one(retries)[1]
        self.assign([job])
        self.claim([job])
        self.start([job])
        return job


def life(bench: Bench, ids: list[int]) -> int:
    """Gas of everything after the submission."""
    return bench.assign(ids) + bench.claim(ids) + bench.start(ids) + bench.finish(ids)


def measure(w3: Web3) -> dict[str, Any]:
    """The whole report; see the module's docstring for the steady state."""
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
    single = {
        "submit": submit,
        "meta_schedule": bench.assign([job]),
        "claim": bench.claim([job]),
        "start": bench.start([job]),
        "finish": bench.finish([job]),
    }
    report["single"] = {**single, "total": sum(single.values())}
    batch = [bench.one() for _ in range(BATCH)]
    total = sum(gas for gas, _ in batch) + life(bench, [job for _, job in batch])
    report["batch50"] = {"per_job": total // BATCH}
    gas, ids = bench.submit([(bench.terms(), [bench.definition()]) for _ in range(BATCH)])
    distinct = (gas + life(bench, ids)) // BATCH
    gas, ids = bench.submit([(bench.terms(), [bench.definition() for _ in range(BATCH)])])
    same = (gas + life(bench, ids)) // BATCH
    report["array50"] = {"per_job": distinct, "per_job_same": same}
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
    job = bench.running()
    report["challenge"] = bench.send(bench.grid.functions.challenge(job), bench.stranger)
    report["answer"] = bench.send(bench.grid.functions.answer(), bench.provider)
    report["register"] = bench.gas["register"]
    return report


def cancels(bench: Bench) -> dict[str, int]:
    """Gas of a cancellation from every live status."""
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
    """The four figures that must hold."""
    return {
        "single": report["single"]["total"],
        "batch50": report["batch50"]["per_job"],
        "array50": report["array50"]["per_job"],
        "array50_same": report["array50"]["per_job_same"],
    }


async def run() -> dict[str, Any]:
    """The report of a node of its own; raises ``NotFoundError`` without anvil."""
    # A fixed genesis keeps every address, and with them the cost of calldata, the same in each run.
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
