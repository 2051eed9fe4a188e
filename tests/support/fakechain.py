"""A fake node without sockets: a mempool, blocks on demand, and injected faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eth_account import Account
from eth_account.typed_transactions import TypedTransaction
from eth_utils import keccak
from hexbytes import HexBytes
from web3.exceptions import TransactionNotFound, Web3RPCError

from deepsquare_chain.chain.rpc.heads import OnDemandDetector
from deepsquare_chain.errors import EndpointError

GWEI = 10**9


def refusal(message: str, code: int = -32000, data: Any = None) -> Web3RPCError:
    """Return the exception that web3 raises for a JSON-RPC error."""
    body = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return Web3RPCError(str(body), rpc_response={"jsonrpc": "2.0", "id": 1, "error": body})


@dataclass
class Tx:
    """A transaction as decoded by the node."""

    raw: bytes
    hash: bytes
    sender: str
    nonce: int
    max_fee: int
    priority_fee: int
    gas: int
    data: bytes

    @classmethod
    def read(cls, raw: bytes) -> Tx:
        fields = TypedTransaction.from_bytes(HexBytes(raw)).as_dict()
        return cls(
            raw=raw,
            hash=keccak(raw),
            sender=Account.recover_transaction(HexBytes(raw)),
            nonce=fields["nonce"],
            max_fee=fields["maxFeePerGas"],
            priority_fee=fields["maxPriorityFeePerGas"],
            gas=fields["gas"],
            data=bytes(fields["data"]),
        )


@dataclass
class FakeBlock:
    """A block with its transactions and logs."""

    number: int
    hash: str
    txs: list[Tx] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)


class FakeChain:
    """Implements the parts of `AsyncWeb3` that sender and follower use.

    `faults` are consumed by the next broadcasts: an exception is raised instead of accepting the
    transaction; ("lost", exception) accepts it and then raises; a function is called
    with the transaction, and returns such a tuple or None.
    """

    def __init__(self) -> None:
        self.blocks = [FakeBlock(0, self._hash(0, 0))]
        self.pool: dict[tuple[str, int], Tx] = {}
        self.base_fee = GWEI
        self.tip = GWEI
        self.tip_error: Exception | None = None
        self.balance = 10**21
        self.estimate = 50_000
        self.gas_limit = 30_000_000
        self.faults: list[Any] = []
        self.sent: list[Tx] = []
        self.failing: set[bytes] = set()  # calldata of transactions that revert when mined
        self.out_of_gas_below = 0
        self.call_error: Exception | None = None
        self.estimate_error: Exception | None = None
        self.automine = True
        self.down = False
        self.hidden_receipts = 0  # number of lookups for which receipts lag
        self.branch = 0
        self.eth = _Eth(self)
        self.provider = self  # for batches
        self.manager = self  # for single requests
        self.on_demand: OnDemandDetector | None = None
        self.simulated: list[Any] = []  # blocks on which calls were simulated
        self.before_batch: Callable[[list[Any]], None] | None = None
        self.batches: list[list[Any]] = []

    async def coro_request(self, method: str, _params: list[Any]) -> str:
        """Answer a request that is sent without web3's methods."""
        assert method == "eth_maxPriorityFeePerGas"
        if self.down:
            raise EndpointError("the endpoint can't be reached")
        if self.tip_error is not None:
            raise self.tip_error
        return hex(self.tip)

    @staticmethod
    def _hash(number: int, branch: int) -> str:
        return "0x" + keccak(f"{number}/{branch}".encode()).hex()

    @property
    def head(self) -> int:
        return self.blocks[-1].number

    def nonce(self, address: str, at: int | None = None) -> int:
        blocks = self.blocks if at is None else self.blocks[: at + 1]
        mined = [tx.nonce for block in blocks for tx in block.txs if tx.sender == address]
        return max(mined, default=-1) + 1

    def mine(self, logs: list[dict[str, Any]] | None = None) -> FakeBlock:
        """Mine a block with the pool's transactions that have the next nonce and pay enough."""
        number = self.head + 1
        block = FakeBlock(number, self._hash(number, self.branch))
        self.blocks.append(block)
        while ready := [
            tx
            for (sender, nonce), tx in self.pool.items()
            if nonce == self.nonce(sender) and tx.max_fee >= self.base_fee
        ]:
            for tx in ready:
                del self.pool[tx.sender, tx.nonce]
                block.txs.append(tx)
        for index, log in enumerate(logs or []):
            location = {
                "blockNumber": hex(number),
                "blockHash": block.hash,
                "transactionHash": "0x" + bytes(32).hex(),
                "logIndex": hex(index),
            }
            block.logs.append(log | location)
        return block

    def reorg(self, depth: int, *, keep: bool = False) -> list[Tx]:
        """Replace the last blocks by empty ones, or only drop them with `keep`.

        Returns the transactions that were in them.
        """
        removed_txs = [tx for block in self.blocks[-depth:] for tx in block.txs]
        del self.blocks[-depth:]
        self.branch += 1
        if not keep:
            for _ in range(depth):
                number = self.head + 1
                self.blocks.append(FakeBlock(number, self._hash(number, self.branch)))
        return removed_txs

    def mined(self, data: bytes | None = None) -> list[Tx]:
        """Return all mined transactions, or those with this calldata."""
        transactions = [tx for block in self.blocks for tx in block.txs]
        return [tx for tx in transactions if data is None or tx.data == data]

    def take(self, raw: bytes) -> bytes:
        tx = Tx.read(raw)
        self.sent.append(tx)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if callable(fault):
            fault = fault(tx)
        self._pool(tx)
        if isinstance(fault, tuple):
            raise fault[1]
        if self.automine:
            self.mine()
        return tx.hash

    def _pool(self, tx: Tx) -> None:
        if tx.nonce < self.nonce(tx.sender):
            raise refusal("nonce too low")
        old = self.pool.get((tx.sender, tx.nonce))
        if old is not None and old.hash == tx.hash:
            raise refusal("already known")
        if old is not None and not (
            tx.max_fee * 10 >= old.max_fee * 11 and tx.priority_fee * 10 >= old.priority_fee * 11
        ):
            raise refusal("replacement transaction underpriced")
        self.pool[tx.sender, tx.nonce] = tx

    def find(self, tx_hash: bytes) -> tuple[FakeBlock | None, Tx] | None:
        for block in self.blocks:
            for tx in block.txs:
                if tx.hash == tx_hash:
                    return block, tx
        return next(((None, tx) for tx in self.pool.values() if tx.hash == tx_hash), None)

    # -- raw JSON-RPC, for the follower

    async def make_batch_request(self, batch: list[tuple[str, list[Any]]]) -> Any:
        if self.down:
            raise EndpointError("down")
        self.batches.append(batch)
        if self.before_batch is not None:
            self.before_batch(batch)
        return [self._answer(method, params) for method, params in batch]

    def _answer(self, method: str, params: list[Any]) -> dict[str, Any]:
        if method == "eth_blockNumber":
            return {"result": hex(self.head)}
        if method == "eth_getTransactionCount":
            return {"result": hex(self.nonce(params[0]))}
        if method == "eth_getBlockByNumber":
            number = self.head if params[0] == "latest" else int(params[0], 16)
            block_found = self.blocks[number] if number <= self.head else None
            block_found_data = block_found and {
                "number": hex(block_found.number),
                "hash": block_found.hash,
                "timestamp": hex(1_000 + block_found.number),
            }
            return {"result": block_found_data}
        assert method == "eth_getLogs"
        if "blockHash" in params[0]:
            numbers = [
                block.number for block in self.blocks if block.hash == params[0]["blockHash"]
            ]
            if not numbers:
                return {"error": {"code": -32000, "message": "unknown block"}}
            first = last = numbers[0]
        else:
            first, last = (int(params[0][key], 16) for key in ("fromBlock", "toBlock"))
        limit = getattr(self, "log_limit", None)
        if limit is not None and last - first + 1 > limit:
            return {"error": {"code": -32005, "message": self.log_words}}
        topics_filter = params[0].get("topics", [])
        found_logs = [
            log
            for block in self.blocks[first : last + 1]
            for log in block.logs
            if all(
                accepted is None or topic in accepted
                for accepted, topic in zip(topics_filter, log["topics"], strict=False)
            )
        ]
        return {"result": found_logs}

    log_limit: int | None = None
    log_words = "query returned more than 10000 results"


class _Eth:
    """The `eth` module of the fake."""

    def __init__(self, chain: FakeChain) -> None:
        self._chain = chain

    def _up(self) -> FakeChain:
        if self._chain.down:
            raise EndpointError("the endpoint can't be reached")
        return self._chain

    @property
    async def block_number(self) -> int:
        return self._up().head

    @property
    async def gas_price(self) -> int:
        return self._up().base_fee + self._up().tip

    async def get_block(self, block_id: Any, full: bool = False) -> dict[str, Any]:
        chain = self._up()
        if full:
            transactions = [
                {"from": tx.sender, "nonce": tx.nonce, "hash": tx.hash, "input": tx.data}
                for tx in chain.blocks[block_id].txs
            ]
            return {"number": block_id, "transactions": transactions}
        return {
            "number": chain.head,
            "baseFeePerGas": chain.base_fee,
            "gasLimit": chain.gas_limit,
            "timestamp": 1_000 + chain.head,
        }

    async def get_balance(self, _address: str, _block: Any) -> int:
        return self._up().balance

    async def get_transaction_count(self, address: str, block: Any) -> int:
        chain = self._up()
        count = chain.nonce(address, block if isinstance(block, int) else None)
        while block == "pending" and (address, count) in chain.pool:
            count += 1
        return count

    async def call(self, _request: Any, block: Any) -> bytes:
        self._chain.simulated.append(block)
        if self._up().call_error is not None:
            raise self._chain.call_error  # type: ignore[misc]
        return b""

    async def estimate_gas(self, _request: Any, block: Any) -> int:
        self._chain.simulated.append(block)
        if self._up().estimate_error is not None:
            raise self._chain.estimate_error  # type: ignore[misc]
        return self._chain.estimate

    async def send_raw_transaction(self, raw: bytes) -> bytes:
        return self._up().take(bytes(raw))

    async def get_transaction(self, tx_hash: bytes) -> Any:
        entry = self._up().find(bytes(tx_hash))
        if entry is None:
            raise TransactionNotFound("not found")
        return entry[1]

    async def get_transaction_receipt(self, tx_hash: bytes) -> dict[str, Any]:
        chain = self._up()
        block, tx = chain.find(bytes(tx_hash)) or (None, None)
        if block is not None and chain.hidden_receipts > 0:
            chain.hidden_receipts -= 1
            block = None
        if block is None or tx is None:
            raise TransactionNotFound("not found")
        out_of_gas = tx.gas < chain.out_of_gas_below
        return {
            "transactionHash": tx.hash,
            "blockNumber": block.number,
            "blockHash": bytes.fromhex(block.hash[2:]),
            "status": 0 if out_of_gas or tx.data in chain.failing else 1,
            "gasUsed": tx.gas if out_of_gas else 21_000,
            "effectiveGasPrice": chain.base_fee + tx.priority_fee,
            "contractAddress": None,
            "logs": [],
        }
