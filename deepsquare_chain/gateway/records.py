"""What a gateway knows of the objects that it keeps: definitions, files, shares."""

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
    sqlite_autoincrement=True,  # an id names objects, so none is given twice
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
    """Where the files of a job and its provider are.

    The customer is part of the name: after a reorganisation a number may be another's job.
    """

    job_id: int
    customer: str
    provider_id: int
    job: Job

    @property
    def key(self) -> str:
        """Name of the space, good as a part of an object's name."""
        return f"{self.job_id}-{self.customer.removeprefix('0x').lower()}-{self.provider_id}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a job; `size` in bytes, `complete` once its last part is there."""

    id: int
    space: str
    name: str
    size: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a file that is one object."""

    start: int
    size: int


class GatewayRecords:
    """The records of one gateway, in its own database."""

    def __init__(self, store: Database) -> None:
        self._store = store
        #: Bytes and files by space, bytes by customer: summed once, then kept up to date, because
        #: each part of an upload asks for them.
        self._totals: OrderedDict[str, tuple[int, int]] = OrderedDict()

    # -- definitions

    def add_definition(self, digest: str, account: str, size: int) -> None:
        """Remember that an account keeps a definition; the object must be there already."""
        key = {"digest": digest, "account": account.lower()}
        mine = (_definitions.c.digest == digest) & (_definitions.c.account == key["account"])
        with self._store.begin() as connection:
            connection.execute(delete(_definitions).where(mine))
            connection.execute(insert(_definitions).values(**key, size=size, used_at=_now()))

    def has_definition(self, digest: str, account: str | None = None) -> bool:
        """Whether anybody, or an account, keeps a definition here."""
        query = select(_definitions.c.digest).where(_definitions.c.digest == digest)
        if account is not None:
            query = query.where(_definitions.c.account == account.lower())
        with self._store.read() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def has_definitions(self, account: str) -> bool:
        """Whether an account keeps any."""
        query = select(_definitions.c.digest).where(_definitions.c.account == account.lower())
        with self._store.read() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def touch_definition(self, digest: str) -> None:
        """A definition was used, so that it is kept on."""
        with self._store.begin(durable=False) as connection:
            connection.execute(
                update_rows(_definitions)
                .where(_definitions.c.digest == digest)
                .values(used_at=_now())
            )

    def definition_bytes(self, account: str) -> int:
        """Bytes of all definitions of an account."""
        return self._sum(_definitions.c.size, _definitions.c.account == account.lower())

    def drop_definitions(self, before: int) -> list[str]:
        """Forget definitions unused since then (epoch seconds); digests that nobody keeps now."""
        old = _definitions.c.used_at < before
        with self._store.begin() as connection:
            gone = set(connection.execute(select(_definitions.c.digest).where(old)).scalars())
            connection.execute(delete(_definitions).where(old))
            kept = select(_definitions.c.digest).where(_definitions.c.digest.in_(gone))
            return sorted(gone - set(connection.execute(kept).scalars()))

    # -- files of jobs

    def file(self, space: JobSpace, name: str) -> StoredFile | None:
        """A file of a job."""
        query = select(_files).where(_files.c.space == space.key, _files.c.name == name)
        with self._store.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _file(row)

    def files(self, space: JobSpace) -> list[StoredFile]:
        """All files of a job by name."""
        query = select(_files).where(_files.c.space == space.key).order_by(_files.c.name)
        with self._store.read() as connection:
            return [_file(row) for row in connection.execute(query)]

    def begin_file(self, space: JobSpace, name: str) -> StoredFile:
        """A new, empty file."""
        with self._store.begin(durable=False) as connection:
            number = connection.execute(
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
        self._count(space, 0, new=True)
        return StoredFile(int(number), space.key, name, 0, False)

    def segments(self, file: StoredFile) -> list[Segment]:
        """The objects of a file in order."""
        query = select(_segments).where(_segments.c.file == file.id).order_by(_segments.c.start)
        with self._store.read() as connection:
            return [Segment(row.start, row.size) for row in connection.execute(query)]

    def put_segment(
        self, space: JobSpace, file: StoredFile, segment: Segment, *, complete: bool
    ) -> StoredFile:
        """A part was written, and is the last of its file for now.

        The object is there before this row: a crash in between leaves a file that is shorter than
        its objects, and the uploader sends that part again.
        """
        size = segment.start + segment.size
        place = (_segments.c.file == file.id) & (_segments.c.start == segment.start)
        with self._store.begin(durable=complete) as connection:
            connection.execute(delete(_segments).where(place))
            connection.execute(
                insert(_segments).values(file=file.id, start=segment.start, size=segment.size)
            )
            grown = _resize(connection, file, size, complete=complete)
        self._count(space, size - file.size)
        return grown

    def finish(self, file: StoredFile) -> StoredFile:
        """A file is complete as it is."""
        with self._store.begin() as connection:
            return _resize(connection, file, file.size, complete=True)

    def job_usage(self, space: JobSpace) -> tuple[int, int]:
        """Bytes and number of the files of a job."""
        return self._usage(space.key, _files.c.space == space.key)

    def customer_usage(self, customer: str) -> tuple[int, int]:
        """Bytes and number of the files of all jobs of a customer."""
        key = customer.lower()
        return self._usage(key, _files.c.customer == key)

    def _usage(self, key: str, condition: Any) -> tuple[int, int]:
        found = self._totals.get(key)
        if found is None:
            query = select(func.coalesce(func.sum(_files.c.size), 0), func.count())
            with self._store.read() as connection:
                row = connection.execute(query.where(condition)).one()
            found = self._totals[key] = (int(row[0]), int(row[1]))
            while len(self._totals) > _MAX_TOTALS:
                self._totals.popitem(last=False)
        return found

    def _count(self, space: JobSpace, added: int, *, new: bool = False) -> None:
        for key in (space.key, space.customer.lower()):
            if key in self._totals:
                size, number = self._totals[key]
                self._totals[key] = (size + added, number + int(new))

    def expired_files(self, before: int, limit: int = 1_000) -> list[StoredFile]:
        """Files that have not changed since then (epoch seconds)."""
        query = select(_files).where(_files.c.changed_at < before).limit(limit)
        with self._store.read() as connection:
            return [_file(row) for row in connection.execute(query)]

    def drop_files(self, files: Sequence[StoredFile]) -> None:
        """Forget files whose objects are removed."""
        self._totals.clear()
        numbers = [file.id for file in files]
        spaces = {file.space for file in files}
        with self._store.begin() as connection:
            connection.execute(delete(_segments).where(_segments.c.file.in_(numbers)))
            connection.execute(delete(_files).where(_files.c.id.in_(numbers)))
            left = set(
                connection.execute(select(_files.c.space).where(_files.c.space.in_(spaces)))
                .scalars()
                .all()
            )
            connection.execute(delete(_results).where(_results.c.space.in_(spaces - left)))

    # -- what a provider says of its results

    def put_results(self, space: JobSpace, body: str) -> None:
        """Keep the list of a job's results (JSON)."""
        with self._store.begin() as connection:
            connection.execute(delete(_results).where(_results.c.space == space.key))
            connection.execute(
                insert(_results).values(space=space.key, body=body, changed_at=_now())
            )

    def results(self, space: JobSpace) -> str | None:
        """The list of a job's results; None before all are there."""
        query = select(_results.c.body).where(_results.c.space == space.key)
        with self._store.read() as connection:
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else str(found)

    # -- shares

    def share(self, job_id: int, customer: str, reader: str, until: int) -> None:
        """Let a reader read a job's output until then (epoch seconds); the past ends it."""
        key = {"job_id": str(job_id), "customer": customer.lower(), "reader": reader.lower()}
        same = [_shares.c[name] == value for name, value in key.items()]
        with self._store.begin() as connection:
            connection.execute(delete(_shares).where(*same))
            connection.execute(insert(_shares).values(**key, until=until))

    def is_shared(self, job_id: int, customer: str, reader: str, now: float) -> bool:
        """Whether a customer shares a job with a reader now."""
        query = select(_shares.c.until).where(
            _shares.c.job_id == str(job_id),
            _shares.c.customer == customer.lower(),
            _shares.c.reader == reader.lower(),
        )
        with self._store.read() as connection:
            until = connection.execute(query).scalar_one_or_none()
        return until is not None and until > now

    def share_count(self, customer: str) -> int:
        """Number of shares of a customer; ended ones are dropped from time to time."""
        query = select(func.count()).where(_shares.c.customer == customer.lower())
        with self._store.read() as connection:
            return int(connection.execute(query).scalar_one())

    def drop_shares(self, before: int) -> None:
        """Forget shares that ended before then (epoch seconds)."""
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
