"""All queries of the index, for the web pages and the JSON API.

Every method is synchronous and reads one snapshot of the database; services call it in a thread.
Lists are paginated with opaque cursors, which stay valid when rows are added or removed by a reorg.
Unknown objects raise `NotFoundError`, invalid arguments `UsageError`.
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
#: Name of the follower that writes the tables.
CURSOR: Final = "index"


class Index(
    JobQueries, AccountQueries, RegistryQueries, BlockQueries, SeriesQueries, AnomalyQueries
):
    """All queries of the index. The database must be opened by `IndexDatabase.open`."""

    def status(self) -> Status:
        """Return the progress and the grid of the index."""
        blocks_query = select(blocks.c.number, blocks.c.hash).where(blocks.c.name == CURSOR)
        with self._read() as (connection, snapshot):
            deployment = self.deployment
            query = blocks_query.order_by(blocks.c.number.desc()).limit(1)
            cursor = connection.execute(query).one_or_none()
            return Status(
                chain_id=deployment.chain_id,
                scheduler=deployment.scheduler,
                registry=deployment.registry,
                credit=deployment.credit,
                treasury=deployment.treasury,
                genesis=snapshot.values.get("genesis", ""),
                start_block=deployment.block,
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
        """Return the changes after the given change number, for live pages."""
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
