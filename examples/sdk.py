"""Submit a job from Python, wait for it, read what it printed, and see what it cost.

With `deepsquare devnet up`, a meta-scheduler and a provider running (README):

    .venv/bin/python examples/sdk.py
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from deepsquare_chain import Grid
from deepsquare_chain.credits import format_credits

JOB = Path(__file__).with_name("hello.yaml")


async def main() -> int:
    async with Grid.open() as grid:
        for offer in await grid.quote(JOB):
            price = format_credits(offer.cost)
            print(f"provider {offer.provider_id}: {price} credits, start {offer.start}")
        made = await grid.submit(JOB, permit=True)
        job_id = made.job_ids[0]
        print(f"job {job_id} in transaction {made.transaction}")
        outcome = await grid.wait(
            job_id, timeout=120, on_change=lambda job: print(f"job {job.id}: {job.status.name}")
        )
        print((await grid.logs(job_id)).decode("utf-8", "replace"), end="")
        for left in await grid.results(job_id):
            print(f"{left.name}: {left.size} bytes, as reported on chain: {left.on_chain}")
        print(
            f"{outcome.billed_seconds} s billed: {format_credits(outcome.paid + outcome.fee)} "
            f"credits used, {format_credits(outcome.refunded)} refunded"
        )
        last = (await grid.statement())[-1]
        print(f"balance {format_credits(last.balance)} credits after a {last.kind}")
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
