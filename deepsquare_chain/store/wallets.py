"""Databases of sent transactions, one per wallet and chain on this machine.

A service and commands of the same wallet share it, so that each nonce is allocated once; any of
them resumes the transactions that another left open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.store.database import Store

FOLDER: Final = "wallets"


def wallet_path(folder: Path, chain_id: int, address: str) -> Path:
    """Return the path of a wallet's database for a chain."""
    return folder / f"{chain_id}-{address}.db"


async def open_wallet_store(
    w3: AsyncWeb3[Any], deployment: Deployment, address: str, folder: Path
) -> Store:
    """Open the database of a wallet, shared with other processes.

    Raises:
        UsageError: The file belongs to another chain or deployment, or is no database.
        StoreError: The disk is full or the folder not writable.
        EndpointError: The endpoint does not answer.
    """
    genesis = await w3.eth.get_block(0)
    return Store.open(
        wallet_path(folder, deployment.chain_id, address),
        chain_id=deployment.chain_id,
        contract=deployment.scheduler,
        account=address,
        genesis=bytes(genesis["hash"]).hex(),
        landmark=getattr(w3.provider, "landmark", None) or "",
    )
