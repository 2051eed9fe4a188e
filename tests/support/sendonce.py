"""A program that sends one transaction exactly once and counts events, killed and restarted.

    python -m tests.support.sendonce URL DEPLOYMENT FOLDER LABEL...

For each label, a child process is killed at this crash point, and another one completes the work.
Prints a JSON line per label: the label, the exit codes of both children, and the counts of the
second one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount
from sqlalchemy import Column, Integer, String, Table, func, insert, select

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Transfer
from deepsquare_chain.chain.follower import Batch, Follower
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.faults import VARIABLE
from deepsquare_chain.store.database import Store, metadata

seen = Table(
    "seen",
    metadata,
    Column("block", Integer, primary_key=True),
    Column("log", Integer, primary_key=True),
    Column("hash", String),
)


def account_of(label: str) -> LocalAccount:
    """Return the account of a label; each has its own, so that runs do not affect each other."""
    account: LocalAccount = Account.from_key(label.encode().rjust(32, b"\x01")[-32:])
    return account


async def work(url: str, deployment: Deployment, path: Path, label: str) -> dict[str, int]:
    """Recover, send one credit-wei to the reversed own address, follow the chain, and count."""
    account = account_of(label)
    async with connected(url, chain_id=deployment.chain_id) as w3:
        with Store.open(
            path,
            chain_id=deployment.chain_id,
            contract=deployment.scheduler,
            account=account.address,
            exclusive=True,
        ) as store:
            sender = Sender(w3, account, store, chain_id=deployment.chain_id, poll_interval=0.05)
            await sender.recover()
            credit = Contracts(w3, deployment).credit
            target = "0x" + account.address[2:].lower()[::-1]
            receipt = await sender.send(credit.transfer(target, 1), key="the one")

            def apply(batch: Batch, connection: object) -> None:
                for event in batch.events:
                    if isinstance(event, Transfer) and event.sender == account.address:
                        row = {"block": event.block_number, "log": event.log_index}
                        connection.execute(insert(seen).values(hash=event.tx_hash, **row))

            follower = Follower(
                w3, [deployment.credit], store, start_block=deployment.block, confirmations=0
            )
            await follower.poll(apply)
            with store.read() as connection:
                count = connection.execute(select(func.count()).select_from(seen)).scalar_one()
            return {
                "counted": count,
                "received": await credit.balance_of(target),
                "nonce": await w3.eth.get_transaction_count(account.address),
                "block": receipt.block_number,
                "open": len(sender.pending()),
            }


def child(url: str, deployment: Deployment, path: Path, label: str, crash: str) -> tuple[int, str]:
    """Run `work` in a forked process; return its exit code and output."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.environ[VARIABLE] = crash
        code = 1
        try:
            counts = asyncio.run(work(url, deployment, path, label))
            os.write(writer, json.dumps(counts).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def main() -> None:
    """Process all labels, one after the other."""
    url, record, folder, *labels = sys.argv[1:]
    deployment = Deployment.load(record)
    for label in labels:
        path = Path(folder) / f"{label}.db"
        first, _ = child(url, deployment, path, label, label)
        second, text = child(url, deployment, path, label, "")
        result = json.loads(text or "{}")
        print(json.dumps({"label": label, "first": first, "second": second, **result}), flush=True)


if __name__ == "__main__":
    main()
