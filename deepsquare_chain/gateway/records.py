"""The database of a gateway: definitions, files, lists of results, and shares."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    Column,
    Connection,
    Index,
    Integer,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy import update as update_rows

from deepsquare_chain.job import Job
from deepsquare_chain.store.database import Database, metadata

_MAX_TOTALS: Final = 10_000

_definitions: Final = Table(
    "gateway_definitions",
    metadata,
    Column("digest", String, primary_key=True),
    Column("account", String, primary_key=True),
    Column("size", Integer, nullable=False),
    Column("used_at", Integer, nullable=False),
)
Index("gateway_definitions_account", _definitions.c.account)
Index("gateway_definitions_used", _definitions.c.used_at)

_files: Final = Table(
    "gateway_files",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("space", String, nullable=False),
    Column("name", Text, nullable=False),
    Column("customer", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("complete", Integer, nullable=False),
    Column("changed_at", Integer, nullable=False),
    sqlite_autoincrement=True,  # IDs are part of object names and must not be reused
)
Index("gateway_files_name", _files.c.space, _files.c.name, unique=True)
Index("gateway_files_customer", _files.c.customer)
Index("gateway_files_changed", _files.c.changed_at)

_segments: Final = Table(
    "gateway_segments",
    metadata,
    Column("file", Integer, primary_key=True),
    Column("start", Integer, primary_key=True),
    Column("size", Integer, nullable=False),
)

_results: Final = Table(
    "gateway_results",
    metadata,
    Column("space", String, primary_key=True),
    Column("body", Text, nullable=False),
    Column("changed_at", Integer, nullable=False),
)

_shares: Final = Table(
    "gateway_shares",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("customer", String, primary_key=True),
    Column("reader", String, primary_key=True),
    Column("until", Integer, nullable=False),
)
Index("gateway_shares_customer", _shares.c.customer)


@dataclass(frozen=True, slots=True)
class JobSpace:
    """The namespace of the files of a job and its provider.

    The customer is part of the key: after a reorg a job ID may be the job of another customer.
    """

    job_id: int
    customer: str
    provider_id: int
    job: Job

    @property
    def key(self) -> str:
        """Return the key of the namespace, safe as a part of an object's name."""
        return f"{self.job_id}-{self.customer.removeprefix('0x').lower()}-{self.provider_id}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a job; `size` in bytes, `complete` once its last part is uploaded."""

    id: int
    space: str
    name: str
    size: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a file stored as one object; `start` and `size` in bytes."""

    start: int
    size: int


class GatewayRecords:
    """Definitions, files, results and shares of one gateway, in its own database."""

    def __init__(self, store: Database) -> None:
        self._store = store
        #: Bytes and number of files by space and by customer. Summed once and then updated, because
        #: each part of an upload checks them.
        self._totals: OrderedDict[str, tuple[int, int]] = OrderedDict()

    # -- definitions

    def add_definition(self, digest: str, account: str, size: int) -> None:
        """Record a definition of an account; the object must exist already."""
        key = {"digest": digest, "account": account.lower()}
        mine = (_definitions.c.digest == digest) & (_definitions.c.account == key["account"])
        with self._store.begin() as connection:
            connection.execute(delete(_definitions).where(mine))
            connection.execute(insert(_definitions).values(**key, size=size, used_at=_now()))

    def has_definition(self, digest: str, account: str | None = None) -> bool:
        """Return whether any account, or this one, has uploaded a definition."""
        query = select(_definitions.c.digest).where(_definitions.c.digest == digest)
        if account is not None:
            query = query.where(_definitions.c.account == account.lower())
        with self._store.read() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def has_definitions(self, account: str) -> bool:
        """Return whether an account has uploaded any definition."""
        query = select(_definitions.c.digest).where(_definitions.c.account == account.lower())
        with self._store.read() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def touch_definition(self, digest: str) -> None:
        """Update the time of last use of a definition, which extends its retention."""
        with self._store.begin(durable=False) as connection:
            connection.execute(
                update_rows(_definitions)
                .where(_definitions.c.digest == digest)
                .values(used_at=_now())
            )

    def definition_bytes(self, account: str) -> int:
        """Return the bytes of all definitions of an account."""
        return self._sum(_definitions.c.size, _definitions.c.account == account.lower())

    def expired_definitions(self, before: int) -> list[str]:
        """Return digests of definitions that no account has used since `before` (epoch seconds)."""
        query = select(_definitions.c.digest).group_by(_definitions.c.digest)
        with self._store.read() as connection:
            rows = connection.execute(query.having(func.max(_definitions.c.used_at) < before))
            return sorted(rows.scalars())

    def is_expired(self, digest: str, before: int) -> bool:
        """Return whether no account has used a definition since `before` (epoch seconds)."""
        query = select(func.max(_definitions.c.used_at)).where(_definitions.c.digest == digest)
        with self._store.read() as connection:
            used_at = connection.execute(query).scalar_one()
        return used_at is not None and used_at < before

    def drop_definition(self, digest: str) -> None:
        """Remove a definition of all accounts."""
        with self._store.begin() as connection:
            connection.execute(delete(_definitions).where(_definitions.c.digest == digest))

    # -- files of jobs

    def file(self, space: JobSpace, name: str) -> StoredFile | None:
        """Return a file of a job; None if it does not exist."""
        query = select(_files).where(_files.c.space == space.key, _files.c.name == name)
        with self._store.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _file(row)

    def files(self, space: JobSpace) -> list[StoredFile]:
        """Return all files of a job, ordered by name."""
        query = select(_files).where(_files.c.space == space.key).order_by(_files.c.name)
        with self._store.read() as connection:
            return [_file(row) for row in connection.execute(query)]

    def begin_file(self, space: JobSpace, name: str) -> StoredFile:
        """Create an empty file."""
        with self._store.begin(durable=False) as connection:
            file_id = connection.execute(
                insert(_files)
                .values(
                    space=space.key,
                    name=name,
                    customer=space.customer.lower(),
                    size=0,
                    complete=0,
                    changed_at=_now(),
                )
                .returning(_files.c.id)
            ).scalar_one()
        self._add_to_totals(space, 0, new_files=True)
        return StoredFile(int(file_id), space.key, name, 0, False)

    def segments(self, file: StoredFile) -> list[Segment]:
        """Return the segments of a file in order."""
        query = select(_segments).where(_segments.c.file == file.id).order_by(_segments.c.start)
        with self._store.read() as connection:
            return [Segment(row.start, row.size) for row in connection.execute(query)]

    def put_segment(
        self, space: JobSpace, file: StoredFile, segment: Segment, *, complete: bool
    ) -> StoredFile:
        """Record the last segment of a file, after its object is written.

        Crash-safe: a crash between the two leaves a file shorter than its objects, and the client
        uploads that part again.
        """
        size = segment.start + segment.size
        same_segment = (_segments.c.file == file.id) & (_segments.c.start == segment.start)
        with self._store.begin(durable=complete) as connection:
            connection.execute(delete(_segments).where(same_segment))
            connection.execute(
                insert(_segments).values(file=file.id, start=segment.start, size=segment.size)
            )
            resized = _resize(connection, file, size, complete=complete)
        self._add_to_totals(space, size - file.size)
        return resized

    def finish(self, file: StoredFile) -> StoredFile:
        """Mark a file as complete."""
        with self._store.begin() as connection:
            return _resize(connection, file, file.size, complete=True)

    def job_usage(self, space: JobSpace) -> tuple[int, int]:
        """Return bytes and number of the files of a job."""
        return self._usage(space.key, _files.c.space == space.key)

    def customer_usage(self, customer: str) -> tuple[int, int]:
        """Return bytes and number of the files of all jobs of a customer."""
        key = customer.lower()
        return self._usage(key, _files.c.customer == key)

    def _usage(self, key: str, condition: Any) -> tuple[int, int]:
        usage = self._totals.get(key)
        if usage is None:
            query = select(func.coalesce(func.sum(_files.c.size), 0), func.count())
            with self._store.read() as connection:
                row = connection.execute(query.where(condition)).one()
            usage = self._totals[key] = (int(row[0]), int(row[1]))
            while len(self._totals) > _MAX_TOTALS:
                self._totals.popitem(last=False)
        return usage

    def _add_to_totals(self, space: JobSpace, added_bytes: int, *, new_files: bool = False) -> None:
        for key in (space.key, space.customer.lower()):
            if key in self._totals:
                size, number = self._totals[key]
                self._totals[key] = (size + added_bytes, number + int(new_files))

    def expired_files(self, before: int, limit: int = 1_000) -> list[StoredFile]:
        """Return files that have not changed since `before` (epoch seconds)."""
        query = select(_files).where(_files.c.changed_at < before).limit(limit)
        with self._store.read() as connection:
            return [_file(row) for row in connection.execute(query)]

    def drop_files(self, files: Sequence[StoredFile]) -> None:
        """Remove the rows of files whose objects were removed."""
        self._totals.clear()
        file_ids = [file.id for file in files]
        spaces = {file.space for file in files}
        with self._store.begin() as connection:
            connection.execute(delete(_segments).where(_segments.c.file.in_(file_ids)))
            connection.execute(delete(_files).where(_files.c.id.in_(file_ids)))
            remaining_spaces = set(
                connection.execute(select(_files.c.space).where(_files.c.space.in_(spaces)))
                .scalars()
                .all()
            )
            connection.execute(
                delete(_results).where(_results.c.space.in_(spaces - remaining_spaces))
            )

    # -- lists of results

    def put_results(self, space: JobSpace, body: str) -> None:
        """Store the list of a job's results (JSON)."""
        with self._store.begin() as connection:
            connection.execute(delete(_results).where(_results.c.space == space.key))
            connection.execute(
                insert(_results).values(space=space.key, body=body, changed_at=_now())
            )

    def results(self, space: JobSpace) -> str | None:
        """Return the list of a job's results (JSON); None before all are uploaded."""
        query = select(_results.c.body).where(_results.c.space == space.key)
        with self._store.read() as connection:
            body = connection.execute(query).scalar_one_or_none()
        return None if body is None else str(body)

    # -- shares

    def share(self, job_id: int, customer: str, reader: str, until: int) -> None:
        """Share a job's output until `until` (epoch seconds); a past time ends the share."""
        key = {"job_id": str(job_id), "customer": customer.lower(), "reader": reader.lower()}
        same = [_shares.c[name] == value for name, value in key.items()]
        with self._store.begin() as connection:
            connection.execute(delete(_shares).where(*same))
            connection.execute(insert(_shares).values(**key, until=until))

    def is_shared(self, job_id: int, customer: str, reader: str, now: float) -> bool:
        """Return whether a customer shares a job with a reader at `now` (epoch seconds)."""
        query = select(_shares.c.until).where(
            _shares.c.job_id == str(job_id),
            _shares.c.customer == customer.lower(),
            _shares.c.reader == reader.lower(),
        )
        with self._store.read() as connection:
            until = connection.execute(query).scalar_one_or_none()
        return until is not None and until > now

    def share_count(self, customer: str, now: float, *, job_id: int, reader: str) -> int:
        """Return the number of valid shares of a customer, without that of a job with a reader."""
        same = (_shares.c.job_id == str(job_id)) & (_shares.c.reader == reader.lower())
        query = select(func.count()).where(
            _shares.c.customer == customer.lower(), _shares.c.until > now, ~same
        )
        with self._store.read() as connection:
            return int(connection.execute(query).scalar_one())

    def drop_shares(self, before: int) -> None:
        """Remove shares that expired before `before` (epoch seconds)."""
        with self._store.begin(durable=False) as connection:
            connection.execute(delete(_shares).where(_shares.c.until < before))

    def _sum(self, column: Any, condition: Any) -> int:
        query = select(func.coalesce(func.sum(column), 0)).where(condition)
        with self._store.read() as connection:
            return int(connection.execute(query).scalar_one())


def _resize(connection: Connection, file: StoredFile, size: int, *, complete: bool) -> StoredFile:
    connection.execute(
        update_rows(_files)
        .where(_files.c.id == file.id)
        .values(size=size, complete=int(complete), changed_at=_now())
    )
    return StoredFile(file.id, file.space, file.name, size, complete)


def _file(row: Any) -> StoredFile:
    return StoredFile(row.id, row.space, row.name, row.size, bool(row.complete))


def _now() -> int:
    return int(time.time())
