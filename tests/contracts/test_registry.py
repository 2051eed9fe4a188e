"""ProviderRegistry: registration, approval of exact versions, offers, prices, labels, bans."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import ProviderStatus
from tests.support.evm import ZERO, Reverted, person, reverts
from tests.support.grid import APPROVAL_PERIOD, HARDWARE, PRICES, Grid, Host

pytestmark = pytest.mark.contracts
CAP = 10 * 10**18
ALL = {"cpus": 32, "mem": 32_000, "gpus": 8}


def status(grid: Grid, account: str) -> ProviderStatus:
    return ProviderStatus(grid.registry.statusOf(account))


# ------------------------------------------------------------------ registering


def test_a_registration_waits_for_its_approval(grid: Grid) -> None:
    account = person("new")
    receipt = grid.registry.register(HARDWARE, PRICES, ["gpu.model=h100"], sender=account)
    assert receipt.value == 1
    proposed = receipt.one("HardwareProposed")
    assert (proposed.provider, proposed.version) == (account, 1)
    assert proposed.hardware._asdict() == HARDWARE
    assert receipt.one("PricesChanged").prices._asdict() == PRICES
    assert receipt.one("LabelsChanged").labels == ["gpu.model=h100"]
    assert not receipt.named("ProviderRegistered")

    provider = grid.registry.getProvider(account)
    assert (provider.id, provider.account) == (0, account)
    assert ProviderStatus(provider.status) is ProviderStatus.WAITING_APPROVAL
    assert (provider.version, provider.pendingVersion, provider.approvedUntil) == (0, 1, 0)
    assert tuple(provider.hardware) == (0, 0, 0, 0)
    assert provider.pendingHardware._asdict() == HARDWARE
    assert tuple(provider.offer) == (0, 0, 0)
    assert provider.prices._asdict() == PRICES
    assert list(provider.labels) == ["gpu.model=h100"]
    assert grid.registry.providerCount() == 0


def test_an_unknown_account_has_no_provider_id(grid: Grid) -> None:
    assert status(grid, grid.stranger) is ProviderStatus.NONE
    assert grid.registry.getProvider(grid.stranger).status == ProviderStatus.NONE
    assert grid.registry.idOf(grid.stranger) == 0
    assert grid.registry.accountOf(0) == grid.registry.accountOf(9) == ZERO


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 0},
        {"cpusPerNode": 0},
        {"memPerNode": 0},
        {"nodes": 2**24 - 1, "cpusPerNode": 257},
        {"nodes": 2**24 - 1, "memPerNode": 2**24 + 2, "cpusPerNode": 1},
        {"nodes": 2**24 - 1, "gpusPerNode": 257, "cpusPerNode": 1},
    ],
)
def test_impossible_hardware_is_refused(grid: Grid, change: dict[str, int]) -> None:
    with reverts("InvalidHardware"):
        grid.register(person("new"), hardware=HARDWARE | change)


def test_the_largest_hardware_keeps_to_its_bits(grid: Grid) -> None:
    largest = {
        "nodes": 2**24 - 1,
        "cpusPerNode": 256,
        "memPerNode": 2**24 + 1,
        "gpusPerNode": 256,
    }
    prices = {"cpu": CAP, "gpu": CAP, "mem": CAP}
    host = grid.provider("largest", hardware=largest, prices=prices)
    provider = grid.registry.getProvider(host.account)
    assert provider.hardware._asdict() == largest
    assert tuple(provider.offer) == (
        (2**24 - 1) * 256,
        (2**24 - 1) * (2**24 + 1),
        (2**24 - 1) * 256,
    )
    assert provider.prices._asdict() == prices
    assert (provider.version, provider.pendingVersion) == (1, 1)
    assert status(grid, host.account) is ProviderStatus.ACTIVE
    assert provider.approvedUntil == grid.chain.now + APPROVAL_PERIOD


def test_widest_nodes_and_memory_of_a_node(grid: Grid) -> None:
    widest = {"nodes": 1, "cpusPerNode": 65_535, "memPerNode": 2**32 - 1, "gpusPerNode": 65_535}
    host = grid.provider("widest", hardware=widest)
    assert grid.registry.getProvider(host.account).hardware._asdict() == widest


@pytest.mark.parametrize("kind", ["cpu", "gpu", "mem"])
def test_prices_are_capped(grid: Grid, host: Host, kind: str) -> None:
    grid.registry.setPrices(PRICES | {kind: CAP}, sender=host.account)
    with reverts("PriceTooHigh", CAP + 1, CAP):
        grid.registry.setPrices(PRICES | {kind: CAP + 1}, sender=host.account)
    with reverts("PriceTooHigh", CAP + 1, CAP):
        grid.register(person("new"), prices=PRICES | {kind: CAP + 1})
    assert getattr(grid.registry.getProvider(host.account).prices, kind) == CAP


@pytest.mark.parametrize("label", ["", "=", "a=", "=b", "ab", "k=" + "v" * 127])
def test_labels_are_key_and_value(grid: Grid, host: Host, label: str) -> None:
    with reverts("InvalidLabel", 1):
        grid.registry.setLabels(["a=b", label], sender=host.account)
    with reverts("InvalidLabel", 0):
        grid.register(person("new"), labels=[label])


@pytest.mark.parametrize("label", ["a=b", "a==", "a=b=c", "k=" + "v" * 126, "k" * 126 + "=v"])
def test_labels_within_bounds_are_taken(grid: Grid, host: Host, label: str) -> None:
    grid.registry.setLabels([label], sender=host.account)
    assert list(grid.registry.getProvider(host.account).labels) == [label]


def test_labels_are_bounded_in_number_and_replaced(grid: Grid, host: Host) -> None:
    labels = [f"k{i}=v" for i in range(32)]
    receipt = grid.registry.setLabels(labels, sender=host.account)
    assert list(receipt.one("LabelsChanged").labels) == labels
    with reverts("TooManyLabels", 33, 32):
        grid.registry.setLabels([*labels, "x=y"], sender=host.account)
    assert list(grid.registry.getProvider(host.account).labels) == labels
    grid.registry.setLabels([], sender=host.account)
    assert list(grid.registry.getProvider(host.account).labels) == []


# -------------------------------------------------------------------- approving


def test_an_approval_gives_id_hardware_offer_and_time(grid: Grid) -> None:
    account = person("new")
    grid.register(account)
    receipt = grid.registry.approve(account, 1, sender=grid.admin)
    assert receipt.one("ProviderRegistered").parameters == {"id": 1, "provider": account}
    approved = receipt.one("ProviderApproved")
    assert (approved.provider, approved.version) == (account, 1)
    assert approved.hardware._asdict() == HARDWARE
    assert approved.approvedUntil == grid.chain.now + APPROVAL_PERIOD
    assert receipt.one("OfferChanged").offer._asdict() == ALL

    provider = grid.registry.getProvider(account)
    assert (provider.id, provider.version, provider.pendingVersion) == (1, 1, 1)
    assert provider.hardware._asdict() == HARDWARE
    assert provider.offer._asdict() == ALL
    assert status(grid, account) is ProviderStatus.ACTIVE
    assert (grid.registry.idOf(account), grid.registry.accountOf(1)) == (1, account)
    assert grid.registry.providerCount() == 1


def test_ids_are_dense_and_kept(grid: Grid) -> None:
    hosts = [grid.provider(f"provider {i}") for i in range(3)]
    assert [host.id for host in hosts] == [1, 2, 3]
    version = grid.register(hosts[1].account)
    receipt = grid.registry.approve(hosts[1].account, version, sender=grid.admin)
    assert not receipt.named("ProviderRegistered")
    assert grid.registry.idOf(hosts[1].account) == 2


def test_registrations_alone_use_up_no_ids(grid: Grid) -> None:
    for i in range(20):
        grid.register(person(f"crowd {i}"))
    assert grid.registry.providerCount() == 0
    assert grid.provider("real one").id == 1


def test_the_last_id(grid: Grid) -> None:
    """The count is set in storage: 65,535 approvals would take too long."""
    account = person("late")
    grid.register(account)
    grid.register(person("too late"))
    address = bytes.fromhex(grid.registry.address[2:])
    slot = next(s for s in range(16) if _count_with(grid, address, s, 65_534) == 65_534)
    grid.chain.state.set_storage(
        address, slot, grid.chain.state.get_storage(address, slot) & ~0xFFFF | 65_534
    )
    grid.registry.approve(account, 1, sender=grid.admin)
    assert grid.registry.accountOf(65_535) == account
    with reverts("RegistryFull"):
        grid.registry.approve(person("too late"), 1, sender=grid.admin)


def _count_with(grid: Grid, address: bytes, slot: int, value: int) -> int:
    before = grid.chain.snapshot()
    word = grid.chain.state.get_storage(address, slot)
    grid.chain.state.set_storage(address, slot, word & ~0xFFFF | value)
    count: int = grid.registry.providerCount()
    grid.chain.revert(before)
    return count


def test_only_the_approver_approves_and_bans(grid: Grid, host: Host) -> None:
    role = grid.registry.APPROVER_ROLE()
    for caller in (host.account, grid.alice, grid.meta, grid.stranger):
        with reverts("AccessControlUnauthorizedAccount", caller, role):
            grid.registry.approve(host.account, 1, sender=caller)
        with reverts("AccessControlUnauthorizedAccount", caller, role):
            grid.registry.ban(host.account, "", sender=caller)
        with reverts("AccessControlUnauthorizedAccount", caller, role):
            grid.registry.unban(host.account, sender=caller)


def test_exactly_the_named_version_is_approved(grid: Grid) -> None:
    """A re-registration just before an approval does not change the approved version."""
    account = person("new")
    grid.register(account)
    grid.register(account, hardware=HARDWARE | {"nodes": 4_000})
    for version in (0, 1, 3):
        with reverts("VersionMismatch", account, version, 2):
            grid.registry.approve(account, version, sender=grid.admin)
    grid.registry.approve(account, 2, sender=grid.admin)
    assert grid.registry.getProvider(account).hardware.nodes == 4_000


def test_new_hardware_waits_while_the_old_stays_in_force(grid: Grid, host: Host) -> None:
    version = grid.register(host.account, hardware=HARDWARE | {"nodes": 9}, labels=["a=b"])
    provider = grid.registry.getProvider(host.account)
    assert (provider.version, provider.pendingVersion) == (1, 2)
    assert (provider.hardware.nodes, provider.pendingHardware.nodes) == (4, 9)
    assert status(grid, host.account) is ProviderStatus.ACTIVE

    # the version in force can be prolonged meanwhile
    grid.chain.advance(1_000)
    receipt = grid.registry.approve(host.account, 1, sender=grid.admin)
    assert receipt.one("ProviderApproved").hardware.nodes == 4
    assert not receipt.named("OfferChanged")
    provider = grid.registry.getProvider(host.account)
    assert (provider.version, provider.pendingVersion, provider.hardware.nodes) == (1, 2, 4)
    assert provider.approvedUntil == grid.chain.now + APPROVAL_PERIOD

    grid.registry.approve(host.account, version, sender=grid.admin)
    provider = grid.registry.getProvider(host.account)
    assert (provider.version, provider.hardware.nodes) == (2, 9)
    with reverts("VersionMismatch", host.account, 1, 2):
        grid.registry.approve(host.account, 1, sender=grid.admin)


@pytest.mark.parametrize(
    ("offer", "nodes", "expected_offer"),
    [
        # an offer of all hardware follows it, up and down
        (ALL, 8, {"cpus": 64, "mem": 64_000, "gpus": 16}),
        (ALL, 2, {"cpus": 16, "mem": 16_000, "gpus": 4}),
        # a smaller offer is kept, limited by the new hardware
        ({"cpus": 10, "mem": 20_000, "gpus": 0}, 8, {"cpus": 10, "mem": 20_000, "gpus": 0}),
        ({"cpus": 10, "mem": 20_000, "gpus": 0}, 2, {"cpus": 10, "mem": 16_000, "gpus": 0}),
        ({"cpus": 31, "mem": 31_999, "gpus": 7}, 1, {"cpus": 8, "mem": 8_000, "gpus": 2}),
        ({"cpus": 32, "mem": 0, "gpus": 1}, 5, {"cpus": 40, "mem": 0, "gpus": 1}),
    ],
)
def test_an_offer_follows_new_hardware(
    grid: Grid, host: Host, offer: dict[str, int], nodes: int, expected_offer: dict[str, int]
) -> None:
    grid.registry.setOffer(offer, sender=host.account)
    version = grid.register(host.account, hardware=HARDWARE | {"nodes": nodes})
    receipt = grid.registry.approve(host.account, version, sender=grid.admin)
    assert receipt.one("OfferChanged").offer._asdict() == expected_offer
    assert grid.registry.getProvider(host.account).offer._asdict() == expected_offer


def test_unknown_accounts_cannot_be_approved_or_banned(grid: Grid) -> None:
    for call in (
        lambda: grid.registry.approve(grid.stranger, 1, sender=grid.admin),
        lambda: grid.registry.ban(grid.stranger, "", sender=grid.admin),
        lambda: grid.registry.unban(grid.stranger, sender=grid.admin),
        lambda: grid.registry.setOffer(ALL, sender=grid.stranger),
        lambda: grid.registry.setPrices(PRICES, sender=grid.stranger),
        lambda: grid.registry.setLabels([], sender=grid.stranger),
        lambda: grid.registry.setDraining(True, sender=grid.stranger),
    ):
        with reverts("NotRegistered", grid.stranger):
            call()


# ------------------------------------------------------------ offer, maintenance


@pytest.mark.parametrize("kind", ["cpus", "mem", "gpus"])
def test_an_offer_is_at_most_the_hardware(grid: Grid, host: Host, kind: str) -> None:
    more = ALL | {kind: ALL[kind] + 1}
    with reverts("OfferTooLarge", *more.values()):
        grid.registry.setOffer(more, sender=host.account)
    receipt = grid.registry.setOffer(ALL | {kind: 0}, sender=host.account)
    assert receipt.one("OfferChanged").provider == host.account
    assert grid.registry.getProvider(host.account).offer._asdict() == ALL | {kind: 0}
    provider = grid.registry.getProvider(host.account)
    assert provider.hardware._asdict() == HARDWARE
    assert provider.approvedUntil == grid.chain.now + APPROVAL_PERIOD


def test_no_offer_before_the_first_approval(grid: Grid) -> None:
    account = person("new")
    grid.register(account)
    with reverts("NotApproved", account):
        grid.registry.setOffer({"cpus": 0, "mem": 0, "gpus": 0}, sender=account)


def test_only_the_provider_can_drain(grid: Grid, host: Host) -> None:
    receipt = grid.registry.setDraining(True, sender=host.account)
    assert receipt.one("DrainingChanged").parameters == {
        "provider": host.account,
        "draining": True,
    }
    assert status(grid, host.account) is ProviderStatus.DRAINING
    grid.registry.setDraining(False, sender=host.account)
    assert status(grid, host.account) is ProviderStatus.ACTIVE


def test_waiting_comes_before_draining(grid: Grid) -> None:
    account = person("new")
    grid.register(account)
    grid.registry.setDraining(True, sender=account)
    assert status(grid, account) is ProviderStatus.WAITING_APPROVAL
    grid.registry.approve(account, 1, sender=grid.admin)
    assert status(grid, account) is ProviderStatus.DRAINING


# ------------------------------------------------------------------------- bans


def test_a_ban_shuts_out_and_an_unban_restores(grid: Grid, host: Host) -> None:
    approved_until = grid.registry.getProvider(host.account).approvedUntil
    receipt = grid.registry.ban(host.account, "cheated", sender=grid.admin)
    assert receipt.one("BanChanged").parameters == {
        "provider": host.account,
        "banned": True,
        "reason": "cheated",
    }
    assert status(grid, host.account) is ProviderStatus.BANNED
    with reverts("ProviderBanned", host.account):
        grid.register(host.account)
    with reverts("ProviderBanned", host.account):
        grid.registry.approve(host.account, 1, sender=grid.admin)
    receipt = grid.registry.unban(host.account, sender=grid.admin)
    assert receipt.one("BanChanged").parameters == {
        "provider": host.account,
        "banned": False,
        "reason": "",
    }
    assert status(grid, host.account) is ProviderStatus.ACTIVE
    assert grid.registry.getProvider(host.account).approvedUntil == approved_until


def test_a_provider_awaiting_approval_can_be_banned(grid: Grid) -> None:
    account = person("new")
    grid.register(account)
    grid.registry.ban(account, "", sender=grid.admin)
    assert status(grid, account) is ProviderStatus.BANNED
    grid.registry.unban(account, sender=grid.admin)
    assert status(grid, account) is ProviderStatus.WAITING_APPROVAL


def test_reasons_of_bans_are_bounded(grid: Grid, host: Host) -> None:
    with reverts("ReasonTooLong", 257, 256):
        grid.registry.ban(host.account, "r" * 257, sender=grid.admin)
    grid.registry.ban(host.account, "r" * 256, sender=grid.admin)


def test_packed_words_for_an_assignment_equal_the_record(grid: Grid, host: Host) -> None:
    """`capacityOf` returns packed storage; decoded here by the documented layout."""
    grid.registry.setOffer({"cpus": 11, "mem": 222, "gpus": 3}, sender=host.account)
    grid.registry.setDraining(True, sender=host.account)
    grid.register(host.account)
    capacity, tariff = grid.registry.capacityOf(host.account)

    def cut(word: int, *widths: int) -> list[int]:
        fields = []
        for width in widths:
            fields.append(word & ((1 << width) - 1))
            word >>= width
        assert word == 0
        return fields

    approved_until = grid.registry.getProvider(host.account).approvedUntil
    assert cut(capacity, 24, 16, 32, 16, 32, 48, 32, 40, 8, 8) == [
        *HARDWARE.values(),
        11,
        222,
        3,
        approved_until,
        1,
        0,
    ]
    assert cut(tariff, 64, 64, 64, 32, 32) == [*PRICES.values(), 1, 2]


def test_values_outside_their_type_are_refused(grid: Grid, host: Host) -> None:
    data = bytearray(grid.registry.setDraining.encode(True))
    data[-1] = 2
    with pytest.raises(Reverted):
        grid.chain.run(grid.registry.address, bytes(data), host.account)
