"""The index as pages and the JSON API ask it.

Every method is synchronous and reads one moment of the database: services call them in threads.
Lists come in pages whose opaque cursors stay valid while rows come, and while a reorganisation
takes some away. Unknown things raise `NotFoundError`, invalid arguments `UsageError`.
"""

from __future__ import annotations

from typing import Final

import pydantic_core
from sqlalchemy import func, select

from deepsquare_chain.indexer.accounts import AccountQueries
from deepsquare_chain.indexer.anomalies import AnomalyQueries
from deepsquare_chain.indexer.blocks import BlockQueries
from deepsquare_chain.indexer.jobs import JobQueries
from deepsquare_chain.indexer.read_models import Change, Changes, Status
from deepsquare_chain.indexer.registry import RegistryQueries
from deepsquare_chain.indexer.schema import changes
from deepsquare_chain.indexer.series import SeriesQueries
from deepsquare_chain.store.schema import blocks

MAX_CHANGES: Final = 200
#: Name of the follower that fills the tables.
CURSOR: Final = "index"


class Index(
    JobQueries, AccountQueries, RegistryQueries, BlockQueries, SeriesQueries, AnomalyQueries
):
    """All questions; made of a database that `IndexDatabase.open` prepared."""

    def status(self) -> Status:
        """How far the index is, and of which grid."""
        last = select(blocks.c.number, blocks.c.hash).where(blocks.c.name == CURSOR)
        with self._read() as (connection, snapshot):
            grid = self.deployment
            query = last.order_by(blocks.c.number.desc()).limit(1)
            cursor = connection.execute(query).one_or_none()
            return Status(
                chain_id=grid.chain_id,
                scheduler=grid.scheduler,
                registry=grid.registry,
                credit=grid.credit,
                treasury=grid.treasury,
                genesis=snapshot.values.get("genesis", ""),
                start_block=grid.block,
                block=snapshot.number("block"),
                block_hash=cursor.hash if cursor is not None else "",
                time=snapshot.number("time", 0),
                finalized=snapshot.finalized,
                head=snapshot.number("head"),
                head_time=snapshot.number("head_time", 0),
                change=snapshot.number("change", 0),
                built_since=float(snapshot.values.get("built_since", 0)),
            )

    def changes(self, since: int, limit: int = MAX_CHANGES) -> Changes:
        """What changed after the change of this number, for live pages."""
        with self._read() as (connection, snapshot):
            latest = snapshot.number("change", 0)
            query = select(changes).where(changes.c.number > since).order_by(changes.c.number)
            rows = connection.execute(query.limit(limit)).all()
            oldest = connection.execute(select(func.min(changes.c.number))).scalar()
        items = tuple(
            Change(
                number=row.number,
                kind=row.kind,
                first_block=row.first_block,
                last_block=row.last_block,
                jobs=tuple(pydantic_core.from_json(row.jobs)),
            )
            for row in rows
        )
        missed = since > latest or (since < latest and (oldest is None or oldest > since + 1))
        return Changes(items[-1].number if items else latest, items, missed)
