"""``eth_feeHistory``, computed from sealed blocks."""

from __future__ import annotations

from typing import Any

from deepsquare_chain.devnet.node.index import BlockRecord, ChainIndex
from deepsquare_chain.devnet.node.rpcerrors import bad_params
from deepsquare_chain.devnet.node.wire import Wire, quantity

SUGGESTED_TIP = 10**9  # wei per gas, the same as anvil's
_MAX_BLOCKS = 1_024
_MAX_PERCENTILES = 100


def fee_history(index: ChainIndex, count: int, newest: BlockRecord, percentiles: Any) -> Wire:
    """Return base fees of ``count`` blocks up to ``newest`` and of the next one, and paid tips."""
    reward_percentiles = _read_percentiles(percentiles)
    count = min(count, _MAX_BLOCKS, newest.number + 1)
    if count < 1:
        return {"oldestBlock": "0x0", "gasUsedRatio": [], "baseFeePerGas": []}
    oldest = newest.number - count + 1
    records = [index.by_number(number) for number in range(oldest, newest.number + 1)]
    blocks = [record for record in records if record is not None]
    history: Wire = {
        "oldestBlock": quantity(oldest),
        "baseFeePerGas": [record.fields["baseFeePerGas"] for record in blocks]
        + [quantity(newest.next_base_fee)],
        "gasUsedRatio": [
            int(record.fields["gasUsed"], 16) / int(record.fields["gasLimit"], 16)
            for record in blocks
        ],
    }
    if reward_percentiles:
        history["reward"] = [
            [quantity(tip) for tip in _rewards(record, reward_percentiles)] for record in blocks
        ]
    return history


def _rewards(record: BlockRecord, percentiles: list[float]) -> list[int]:
    """Return the tips in wei per gas at each percentile of the block's gas."""
    base_fee = int(record.fields["baseFeePerGas"], 16)
    paid = sorted(
        (int(receipt["effectiveGasPrice"], 16) - base_fee, int(receipt["gasUsed"], 16))
        for receipt in record.receipts
    )
    total = sum(gas for _, gas in paid)
    rewards = []
    for percentile in percentiles:
        gas_so_far, percentile_tip = 0, 0
        for tip, gas in paid:
            percentile_tip = tip
            gas_so_far += gas
            if gas_so_far >= total * percentile / 100:
                break
        rewards.append(percentile_tip)
    return rewards


def _read_percentiles(value: Any) -> list[float]:
    value = value or []
    if not isinstance(value, list) or len(value) > _MAX_PERCENTILES:
        raise bad_params(f"reward percentiles must be a list of at most {_MAX_PERCENTILES}")
    if not all(
        isinstance(percentile, (int, float)) and 0 <= percentile <= 100 for percentile in value
    ):
        raise bad_params("reward percentiles must be numbers from 0 to 100")
    if value != sorted(value):
        raise bad_params("reward percentiles must be in ascending order")
    return [float(percentile) for percentile in value]
