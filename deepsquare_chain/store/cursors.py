"""Tables of the follower's cursors."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from deepsquare_chain.chain.follower import Block
from deepsquare_chain.store.base import Database
from deepsquare_chain.store.schema import blocks


class CursorTables(Database):
    """Implements `deepsquare_chain.chain.follower.CursorStore` for connections."""

    def recent_blocks(self, name: str) -> Sequence[Block]:
        """Return the kept blocks of a follower, latest first; the first one is its cursor."""
        query = select(blocks).where(blocks.c.name == name).order_by(blocks.c.number.desc())
        with self.read() as connection:
            return [Block(row.number, row.hash) for row in connection.execute(query)]

    def advance(self, transaction: Connection, name: str, seen: Sequence[Block], keep: int) -> None:
        """Move the cursor to the last of these blocks and keep the latest `keep`."""
        latest = seen[-keep:]
        self.rewind(transaction, name, latest[0].number - 1)
        rows = [{"name": name, "number": block.number, "hash": block.hash} for block in latest]
        transaction.execute(insert(blocks), rows)
        oldest = (
            select(blocks.c.number)
            .where(blocks.c.name == name)
            .order_by(blocks.c.number.desc())
            .offset(keep - 1)
            .limit(1)
            .scalar_subquery()
        )
        transaction.execute(delete(blocks).where(blocks.c.name == name, blocks.c.number < oldest))

    def rewind(self, transaction: Connection, name: str, number: int) -> None:
        """Forget every block after this one."""
        transaction.execute(delete(blocks).where(blocks.c.name == name, blocks.c.number > number))
