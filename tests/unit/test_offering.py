"""A provider's offer follows its cluster when the change is worth its gas."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deepsquare_chain.job import NO_LOAD, Load, Offer
from deepsquare_chain.provider import offering
from deepsquare_chain.provider.offering import AbilityPublisher, is_worth_a_change, target_offer

HARDWARE = Offer(cpus=64, memory=6400, gpus=2)


def test_target_is_free_capacity_plus_that_of_the_grids_jobs() -> None:
    free, in_use = Offer(10, 1000, 1), Load(6, 600, 0)
    assert target_offer(HARDWARE, free, in_use) == Offer(16, 1600, 1)
    # Never more than is registered, whatever the cluster has.
    assert target_offer(HARDWARE, Offer(100, 9000, 9), in_use) == HARDWARE
    assert target_offer(HARDWARE, Offer(0, 0, 0), NO_LOAD) == Offer(0, 0, 0)


@pytest.mark.parametrize(
    ("offer", "is_sent"),
    [
        (Offer(64, 6400, 2), False),
        (Offer(57, 6400, 2), False),  # 7 of 64 CPUs
        (Offer(56, 6400, 2), True),  # an eighth
        (Offer(64, 5600, 2), True),
        (Offer(64, 5601, 2), False),
        (Offer(64, 6400, 1), True),
        (Offer(0, 0, 0), True),
    ],
)
def test_changes_that_are_worth_their_gas(offer: Offer, is_sent: bool) -> None:
    assert is_worth_a_change(HARDWARE, offer) is is_sent
    assert is_worth_a_change(offer, HARDWARE) is is_sent


def test_the_first_and_the_last_of_something_count_however_small() -> None:
    empty_offer, small_offer = Offer(0, 0, 0), Offer(1, 1, 0)
    assert is_worth_a_change(empty_offer, small_offer)
    assert is_worth_a_change(small_offer, empty_offer)
    assert not is_worth_a_change(small_offer, small_offer)


async def test_labels_of_abilities_that_were_replaced_are_published_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`provider labels` replaces all labels; the next test of abilities is hours away."""
    published: list[dict[str, str]] = []
    registered = SimpleNamespace(labels={"site": "here"})

    async def provider_of(account: str) -> Any:
        return registered

    async def send(labels: dict[str, str], *, timeout: float) -> Any:
        published.append(labels)
        registered.labels = labels
        return SimpleNamespace(block_number=1)

    async def probe(executor: object) -> dict[str, str]:
        return {"tasks": "yes", "container": "not installed"}

    async def until_published(times: int) -> None:
        async with asyncio.timeout(30):
            while len(published) < times:
                publisher.follow()
                await asyncio.sleep(0.01)
        publisher.follow()

    monkeypatch.setattr(offering, "probe_abilities", probe)
    registry = SimpleNamespace(provider_of=provider_of, set_labels=dict)
    publisher = AbilityPublisher(
        cast("Any", None),
        cast("Any", SimpleNamespace(registry=registry)),
        cast("Any", SimpleNamespace(address="0x01", send=send)),
        timeout=1,
        own=lambda: {"own": "label"},
    )
    publisher.restore({})  # nothing is known before the first test
    await until_published(1)
    assert published[0] == {"site": "here", "own": "label", "ability.tasks": "yes"}
    publisher.restore(registered.labels)
    await asyncio.sleep(0.05)
    assert len(published) == 1
    registered.labels = {"site": "there"}
    publisher.restore(registered.labels)
    await until_published(2)
    assert published[1] == {"site": "there", "own": "label", "ability.tasks": "yes"}
    await publisher.close()
