"""Counts what a service asks its endpoint, without a clock and without a proxy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepsquare_chain.chain.rpc import on_demand
from deepsquare_chain.chain.rpc.endpoint import CheckedProvider


def counted_requests(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A list that gets the methods of each HTTP request from now on.

    The chain never counts as one that stands still: that is judged by the clock, and costs a request.
    """
    monkeypatch.setattr(on_demand, "_LEAST", float("inf"))
    found: list[list[str]] = []
    post = CheckedProvider._post

    async def counting(self: CheckedProvider, body: bytes) -> Any:
        asked = json.loads(body)
        found.append([each["method"] for each in (asked if isinstance(asked, list) else [asked])])
        return await post(self, body)

    monkeypatch.setattr(CheckedProvider, "_post", counting)
    return found
