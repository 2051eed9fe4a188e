"""Counts the requests of a service to its endpoint, without timing and without a proxy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepsquare_chain.chain.rpc import heads
from deepsquare_chain.chain.rpc.endpoint import CheckedProvider


def counted_requests(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list to which the methods of each HTTP request are appended from now on.

    Disables the detection of chains that mine on demand: it depends on timing, and costs a request.
    """
    monkeypatch.setattr(heads, "_MIN_IDLE", float("inf"))
    requests: list[list[str]] = []
    post = CheckedProvider._post

    async def counting(self: CheckedProvider, body: bytes) -> Any:
        document = json.loads(body)
        requests.append(
            [item["method"] for item in (document if isinstance(document, list) else [document])]
        )
        return await post(self, body)

    monkeypatch.setattr(CheckedProvider, "_post", counting)
    return requests
