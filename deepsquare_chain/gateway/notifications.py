"""Notifications that a gateway sends for customers, to the recipients that they registered.

A customer registers recipients for definitions before it submits their jobs. Recipients and webhook
keys stay in the gateway's database. Webhooks go to public addresses only, so that customers can't
reach the gateway's own network through it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from pydantic_core import from_json, to_json
from sqlalchemy import Column, Integer, String, Table, Text, delete, func, insert, select

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import DAY
from deepsquare_chain.notification import (
    MAX_TARGETS,
    Notify,
    is_email,
    parse_occasions,
    parse_target,
)
from deepsquare_chain.notify.delivery import Deliverer
from deepsquare_chain.notify.service import NotifyService, NotifySettings
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import RateLimit, RequestRefusedError
from deepsquare_chain.store.database import Database, Store, metadata
from deepsquare_chain.store.gateway_client import MAX_REGISTERED_DEFINITIONS
from deepsquare_chain.store.notifications import Delivery, NotificationTables

#: Maximum definitions of one customer.
_MAX_REGISTERED: Final = 10_000
#: Seconds after which registered recipients are removed: longer than a job can take.
_KEEP_RECIPIENTS: Final = 400 * DAY
_MAX_KEY: Final = 200
_MAX_LISTED: Final = 500

_recipients: Final = Table(
    "gateway_notify_recipients",
    metadata,
    Column("account", String, primary_key=True),
    Column("definition", String, primary_key=True),
    Column("requests", Text, nullable=False),
    Column("changed_at", Integer, nullable=False),
)
_keys: Final = Table(
    "gateway_notify_keys",
    metadata,
    Column("account", String, primary_key=True),
    Column("key", Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Registration:
    """Recipients for jobs of some definitions (hexadecimal digests), and the key of webhooks."""

    definitions: tuple[str, ...]
    requests: tuple[Notify, ...]
    key: str = ""


def read_registration(body: Mapping[str, Any]) -> Registration:
    """Read a registration: `{"definitions": [DIGEST, ...], "requests": [{"to", "on"}, ...], "key"}`.

    Raises:
        UsageError: A part of it is invalid.
    """
    definitions, requests, key = body.get("definitions"), body.get("requests"), body.get("key", "")
    if not isinstance(definitions, list) or not 1 <= len(definitions) <= MAX_REGISTERED_DEFINITIONS:
        raise UsageError(f"definitions must be a list of 1 to {MAX_REGISTERED_DEFINITIONS} digests")
    if not all(isinstance(digest, str) and _is_digest(digest) for digest in definitions):
        raise UsageError("A definition is named by its SHA-256, 64 hexadecimal digits")
    if not isinstance(key, str) or len(key) > _MAX_KEY or not key.isprintable():
        raise UsageError(f"key must be a text of at most {_MAX_KEY} characters")
    if not isinstance(requests, list) or len(requests) > 2:
        raise UsageError("requests must be a list of at most two objects")
    return Registration(tuple(definitions), tuple(map(_request, requests)), key)


def _request(body: Any) -> Notify:
    values = body if isinstance(body, dict) else {}
    targets, occasions = _texts(values.get("to")), _texts(values.get("on"))
    if not targets or not occasions or len(targets) > MAX_TARGETS:
        raise UsageError(f"A request has 1 to {MAX_TARGETS} recipients (to), and occasions (on)")
    try:
        return Notify(tuple(dict.fromkeys(map(parse_target, targets))), parse_occasions(occasions))
    except ValueError as error:
        raise UsageError(f"A recipient or an occasion {error}") from None


def _texts(values: Any) -> list[str]:
    """Return a list of texts; empty if it is something else."""
    is_list = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_list else []


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(char in "0123456789abcdef" for char in text)


class Recipients:
    """The recipients and webhook keys of all customers, in the gateway's database."""

    def __init__(self, store: Database) -> None:
        self._store = store
        rows = store.rows(select(_recipients.c.account).distinct())
        self._accounts = {str(row.account) for row in rows}

    def register(self, account: str, registration: Registration) -> None:
        """Store recipients; they replace those of the same definitions, none remove them.

        Raises:
            RequestRefusedError: The account has registered too many definitions.
        """
        account = account.lower()
        requests = [{"to": request.to, "on": request.on} for request in registration.requests]
        own_rows = _recipients.c.account == account
        rows = [
            {
                "account": account,
                "definition": definition,
                "requests": to_json(requests).decode(),
                "changed_at": int(time.time()),
            }
            for definition in dict.fromkeys(registration.definitions)
            if requests
        ]
        with self._store.begin() as connection:
            connection.execute(
                delete(_recipients).where(
                    own_rows, _recipients.c.definition.in_(registration.definitions)
                )
            )
            count = select(func.count()).select_from(_recipients).where(own_rows)
            if connection.execute(count).scalar_one() + len(rows) > _MAX_REGISTERED:
                raise RequestRefusedError(
                    f"{account} has registered as many definitions as it may",
                    code="quota",
                    status=HTTPStatus.INSUFFICIENT_STORAGE,
                    hint="Recipients of a definition are removed by a request without any.",
                )
            if rows:
                connection.execute(insert(_recipients), rows)
                connection.execute(delete(_keys).where(_keys.c.account == account))
                connection.execute(insert(_keys).values(account=account, key=registration.key))
        if rows:
            self._accounts.add(account)

    def has(self, account: str) -> bool:
        """Return whether an account has registered recipients."""
        return account.lower() in self._accounts

    def requests(self, account: str, definition: str) -> tuple[Notify, ...]:
        """Return the requests for a definition of an account."""
        query = select(_recipients.c.requests).where(
            _recipients.c.account == account.lower(), _recipients.c.definition == definition
        )
        return tuple(
            Notify(tuple(request["to"]), parse_occasions(request["on"]))
            for request in from_json(self._store.scalar(query) or "[]")
        )

    def key(self, account: str) -> bytes:
        """Return the webhook key of an account; empty if it has none."""
        query = select(_keys.c.key).where(_keys.c.account == account.lower())
        return str(self._store.scalar(query) or "").encode()

    def drop(self, before: int) -> None:
        """Remove recipients that were registered before `before` (epoch seconds)."""
        old = _recipients.c.changed_at < before
        self._store.write(delete(_recipients).where(old), durable=False)


class GatewayNotifications:
    """Registers recipients, and notifies them of the jobs of their customers.

    Args:
        deliverer: Sends the notifications, with the customers' keys (`Recipients.key`).
        per_day: Maximum notifications of one customer per day; more are dropped.
        start_block: First block to read, unless the database has a later cursor.
    """

    def __init__(
        self,
        contracts: Contracts,
        store: Store,
        deliverer: Deliverer,
        recipients: Recipients,
        settings: NotifySettings,
        *,
        per_day: int,
        has_mail: bool,
        start_block: int,
        metrics: Metrics,
    ) -> None:
        self.has_mail = has_mail
        self._recipients = recipients
        self._tables = NotificationTables(store)
        self._limit = RateLimit(per_day / DAY, per_day)
        self._service = NotifyService(
            contracts,
            None,
            store,
            requests=recipients.requests,
            deliverer=deliverer,
            settings=settings,
            start_block=start_block,
            metrics=metrics,
            has_requests=recipients.has,
            take_quota=lambda customer: not self._limit.wait(customer.lower()),
        )

    def register(self, account: str, body: Mapping[str, Any]) -> None:
        """Register recipients of an account; see `read_registration` for the body.

        Raises:
            UsageError: The body is invalid.
            RequestRefusedError: There is no mail server, or too many definitions are registered.
        """
        registration = read_registration(body)
        targets = [target for request in registration.requests for target in request.to]
        if not self.has_mail and any(map(is_email, targets)):
            raise RequestRefusedError(
                "This gateway sends no e-mail",
                code="no-mail",
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
                hint="Name a webhook (https://...), or send e-mail with `deepsquare notify run`.",
            )
        self._recipients.register(account, registration)

    def latest(self, account: str, limit: int) -> list[dict[str, Any]]:
        """Return the newest notifications of an account's jobs."""
        return [
            {
                "event": event.id,
                "job_id": event.job_id,
                "status": event.after.name,
                "time": event.time,
                "target": delivery.target,
                "state": delivery.state.value,
                "attempts": delivery.attempts,
                "note": delivery.note,
            }
            for event, delivery in self._tables.latest(min(limit, _MAX_LISTED), customer=account)
        ]

    async def cycle(self) -> bool:
        """Read new events and send due notifications; see `NotifyService.cycle`."""
        return await self._service.cycle()

    def clean(self, keep_seconds: int) -> None:
        """Remove old notifications, and recipients that are no longer needed."""
        now = int(time.time())
        self._tables.drop(now - keep_seconds)
        self._recipients.drop(now - _KEEP_RECIPIENTS)


class CustomerDeliverer(Deliverer):
    """Sends notifications of customers: to public addresses, signed by the customer's own key."""

    def __init__(self, recipients: Recipients, **options: Any) -> None:
        super().__init__(**options)
        self._recipients = recipients

    def secret_of(self, delivery: Delivery) -> bytes:
        """Return the key of the job's customer."""
        return self._recipients.key(str(from_json(delivery.message)["job"]["customer"]))
