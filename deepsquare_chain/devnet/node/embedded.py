"""The embedded chain: a JSON-RPC node that runs in this process or in a child process.

``python -m deepsquare_chain.devnet.node.embedded --port 8545`` prints one JSON line when it is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import psutil
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

# The C keccak is seven times faster than the Python one, and half of the EVM's work is keccak.
if importlib.util.find_spec("sha3") is not None:
    os.environ.setdefault("ETH_HASH_BACKEND", "pysha3")

from deepsquare_chain import __version__
from deepsquare_chain.devnet.node.base import (
    DEFAULT_CHAIN_ID,
    DEV_BALANCE,
    ChildProcess,
    Node,
    dev_accounts,
)
from deepsquare_chain.devnet.node.core import BlockRecord, ChainIndex, Core, LogFilter, Worker
from deepsquare_chain.devnet.node.wire import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    RpcError,
    Wire,
    data,
    invalid_params,
    quantity,
    read_call,
    read_data,
    read_quantity,
    read_tag,
    server_error,
)
from deepsquare_chain.errors import EndpointError, GridError, UsageError
from deepsquare_chain.observability.serving import (
    LOOPBACK_ONLY,
    LoopbackServer,
    read_body,
    sends_json,
)

# -- ``eth_feeHistory``, computed from sealed blocks

SUGGESTED_TIP = 10**9  # wei per gas, the same as anvil's
_MAX_BLOCKS = 1_024
_MAX_PERCENTILES = 100

MAX_BODY = 5 * 1024 * 1024  # bytes, the same limit as geth
MAX_BATCH = 1_000

RpcResponse = dict[str, Any]


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
        raise invalid_params(f"reward percentiles must be a list of at most {_MAX_PERCENTILES}")
    if not all(
        isinstance(percentile, (int, float)) and 0 <= percentile <= 100 for percentile in value
    ):
        raise invalid_params("reward percentiles must be numbers from 0 to 100")
    if value != sorted(value):
        raise invalid_params("reward percentiles must be in ascending order")
    return [float(percentile) for percentile in value]


T = TypeVar("T")
Handler = Callable[..., Any]

_MAX_TOPICS = 4


class Methods:
    """Executes JSON-RPC methods: ``await methods.call(name, params)``; raises ``RpcError``."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._core = worker.core
        self._index = worker.core.index
        self._chain_id = worker.core.engine.chain_id
        self._table = self._build()

    async def call(self, name: str, params: list[Any]) -> Any:
        entry = self._table.get(name)
        if entry is None:
            raise RpcError(
                METHOD_NOT_FOUND, f"the method {name[:80]} does not exist/is not available"
            )
        handler, required, allowed = entry
        if len(params) < required:
            raise invalid_params(f"missing value for required argument {len(params)}")
        if len(params) > allowed:
            raise invalid_params(f"too many arguments, want at most {allowed}")
        result = handler(*params)
        return await result if asyncio.iscoroutine(result) else result

    def _build(self) -> dict[str, tuple[Handler, int, int]]:
        """Map the names to (handler, minimum and maximum number of parameters)."""
        return {
            "web3_clientVersion": (lambda: f"DeepSquare-devnet/v{__version__}/py-evm", 0, 0),
            "net_version": (lambda: str(self._chain_id), 0, 0),
            "net_listening": (lambda: True, 0, 0),
            "eth_chainId": (lambda: quantity(self._chain_id), 0, 0),
            "eth_syncing": (lambda: False, 0, 0),
            "eth_accounts": (list, 0, 0),
            "eth_blockNumber": (lambda: quantity(self._index.head.number), 0, 0),
            "eth_gasPrice": (
                lambda: quantity(self._index.head.next_base_fee + SUGGESTED_TIP),
                0,
                0,
            ),
            "eth_maxPriorityFeePerGas": (lambda: quantity(SUGGESTED_TIP), 0, 0),
            "eth_blobBaseFee": (lambda: "0x1", 0, 0),
            "eth_feeHistory": (self._fee_history, 2, 3),
            "eth_getBlockByNumber": (self._block_by_number, 1, 2),
            "eth_getBlockByHash": (self._block_by_hash, 1, 2),
            "eth_getBlockReceipts": (self._block_receipts, 1, 1),
            "eth_getBlockTransactionCountByNumber": (self._count, 1, 1),
            "eth_getBlockTransactionCountByHash": (self._count, 1, 1),
            "eth_getTransactionByHash": (self._transaction, 1, 1),
            "eth_getTransactionReceipt": (self._receipt, 1, 1),
            "eth_getTransactionByBlockNumberAndIndex": (self._transaction_at, 2, 2),
            "eth_getTransactionByBlockHashAndIndex": (self._transaction_at, 2, 2),
            "eth_getLogs": (self._logs, 1, 1),
            "eth_call": (self._call, 1, 4),
            "eth_estimateGas": (self._estimate, 1, 3),
            "eth_getBalance": (self._balance, 1, 2),
            "eth_getTransactionCount": (self._nonce, 1, 2),
            "eth_getCode": (self._code, 1, 2),
            "eth_getStorageAt": (self._storage, 2, 3),
            "eth_sendRawTransaction": (self._send_raw, 1, 1),
            "evm_mine": (self._mine, 0, 1),
            "evm_increaseTime": (self._increase_time, 1, 1),
            "evm_setNextBlockTimestamp": (self._set_next_timestamp, 1, 1),
        }

    async def _work(self, work: Callable[[], T], *, urgent: bool = False) -> T:
        return await asyncio.wrap_future(self._worker.submit(work, urgent=urgent))

    # -- blocks, transactions, logs: from the index

    def _record(self, tag: Any) -> BlockRecord | None:
        block = read_tag(tag)
        if isinstance(block, bytes):
            return self._index.by_hash(data(block))
        if isinstance(block, int):
            return self._index.by_number(block)
        return self._index.by_number(0) if block == "earliest" else self._index.head

    def _block_by_number(self, tag: Any, full: Any = False) -> Any:
        if tag == "pending":
            return self._work(lambda: self._core.pending_block(bool(full)))
        record = self._record(tag)
        return record.to_wire(bool(full)) if record else None

    def _block_by_hash(self, block_hash: Any, full: Any = False) -> Any:
        record = self._index.by_hash(data(read_data(block_hash, "block hash", 32)))
        return record.to_wire(bool(full)) if record else None

    def _block_receipts(self, tag: Any) -> Any:
        record = self._record(_hash_or_tag(tag))
        return list(record.receipts) if record else None

    def _count(self, tag: Any) -> Any:
        record = self._record(_hash_or_tag(tag))
        return quantity(len(record.transactions)) if record else None

    def _transaction_at(self, tag: Any, position: Any) -> Any:
        record = self._record(_hash_or_tag(tag))
        index = read_quantity(position, "index")
        if record is None or index >= len(record.transactions):
            return None
        return record.transactions[index]

    async def _transaction(self, tx_hash: Any) -> Any:
        raw = read_data(tx_hash, "transaction hash", 32)
        transaction = self._index.transaction(data(raw))
        if transaction is None:
            transaction = await self._work(lambda: self._core.waiting_transaction(raw), urgent=True)
        # It may have been sealed between the two lookups.
        return transaction or self._index.transaction(data(raw))

    def _receipt(self, tx_hash: Any) -> Any:
        return self._index.receipt(data(read_data(tx_hash, "transaction hash", 32)))

    def _logs(self, wanted: Any) -> Any:
        if not isinstance(wanted, dict):
            raise invalid_params("the filter must be an object")
        log_filter = _read_filter(wanted)
        head = self._index.head.number
        if wanted.get("blockHash") is not None:
            if wanted.get("fromBlock") is not None or wanted.get("toBlock") is not None:
                raise invalid_params(
                    "cannot specify both blockHash and fromBlock/toBlock, choose one"
                )
            record = self._index.by_hash(data(read_data(wanted["blockHash"], "blockHash", 32)))
            if record is None:
                raise server_error("unknown block")
            return list(self._index.logs(record.number, record.number, log_filter))
        first = _height(wanted.get("fromBlock"), head)
        last = _height(wanted.get("toBlock"), head)
        if first > last and last < head:
            raise invalid_params("invalid block range params")
        return list(self._index.logs(first, last, log_filter))

    def _fee_history(self, count: Any, newest: Any, percentiles: Any = None) -> Any:
        record = self._record(newest)
        if record is None:
            raise server_error("request beyond head block")
        return fee_history(self._index, read_quantity(count, "block count"), record, percentiles)

    # -- state: on the worker thread

    async def _call(self, request: Any, tag: Any = None, *overrides: Any) -> str:
        if any(overrides):
            raise invalid_params(
                "state and block overrides are not supported by the embedded chain"
            )
        call, block = read_call(request), read_tag(tag)
        return await self._work(lambda: self._core.call(call, block))

    async def _estimate(self, request: Any, tag: Any = None, *overrides: Any) -> str:
        if any(overrides):
            raise invalid_params("state overrides are not supported by the embedded chain")
        call, block = read_call(request), read_tag(tag)
        return quantity(await self._work(lambda: self._core.estimate_gas(call, block)))

    async def _balance(self, address: Any, tag: Any = None) -> str:
        account, block = read_data(address, "address", 20), read_tag(tag)
        return quantity(await self._work(lambda: self._core.balance(account, block)))

    async def _nonce(self, address: Any, tag: Any = None) -> str:
        account, block = read_data(address, "address", 20), read_tag(tag)
        return quantity(await self._work(lambda: self._core.nonce(account, block)))

    async def _code(self, address: Any, tag: Any = None) -> str:
        account, block = read_data(address, "address", 20), read_tag(tag)
        return await self._work(lambda: self._core.code(account, block))

    async def _storage(self, address: Any, slot: Any, tag: Any = None) -> str:
        account, block = read_data(address, "address", 20), read_tag(tag)
        key = read_quantity(slot, "slot")
        return await self._work(lambda: self._core.storage(account, key, block))

    async def _send_raw(self, raw: Any) -> str:
        signed = read_data(raw, "transaction")
        return await self._work(lambda: self._core.send_raw(signed), urgent=True)

    # -- for tests: control of time and blocks, with anvil's names

    async def _mine(self, timestamp: Any = None) -> str:
        if timestamp is not None:
            await self._set_next_timestamp(timestamp)
        await self._work(self._core.mine)
        return "0x0"

    async def _increase_time(self, seconds: Any) -> str:
        step = read_quantity(seconds, "seconds")
        return quantity(await self._work(lambda: self._core.increase_time(step)))

    async def _set_next_timestamp(self, timestamp: Any) -> None:
        value = read_quantity(timestamp, "timestamp")
        await self._work(lambda: self._core.set_next_timestamp(value))


def _hash_or_tag(value: Any) -> Any:
    """Convert a bare 32-byte hash to the object form of EIP-1898; other values pass unchanged."""
    is_hash = isinstance(value, str) and len(value) == 66
    return {"blockHash": value} if is_hash else value


def _height(value: Any, head: int) -> int:
    block = read_tag(value)
    if isinstance(block, int):
        return block
    return 0 if block == "earliest" else head


def _read_filter(wanted: dict[str, Any]) -> LogFilter:
    addresses = wanted.get("address")
    if not isinstance(addresses, list):
        addresses = [] if addresses is None else [addresses]
    topics = wanted.get("topics") or []
    if not isinstance(topics, list) or len(topics) > _MAX_TOPICS:
        raise invalid_params(f"topics must be a list of at most {_MAX_TOPICS}")
    return LogFilter(
        addresses=frozenset(data(read_data(item, "address", 20)) for item in addresses),
        topics=tuple(_read_topic(item) for item in topics),
    )


def _read_topic(value: Any) -> frozenset[str] | None:
    """Read one position of a topic filter: a hash, a list of alternatives, or None for any."""
    if value is None:
        return None
    alternatives = value if isinstance(value, list) else [value]
    if not alternatives or None in alternatives:
        return None
    return frozenset(data(read_data(topic, "topic", 32)) for topic in alternatives)


def rpc_app(methods: Methods) -> Starlette:
    """Return the HTTP application of the node; it accepts JSON-RPC by POST /."""

    async def handle(request: Request) -> Response:
        if not sends_json(request):
            return PlainTextResponse("send application/json", status_code=415)
        body = await read_body(request, MAX_BODY)
        if body is None:
            return PlainTextResponse(f"content length too large (limit {MAX_BODY})", 413)
        reply = await respond(methods, body)
        if reply is None:
            return Response(status_code=204)
        encoded = json.dumps(reply, separators=(",", ":"))
        return Response(encoded, media_type="application/json")

    return Starlette(routes=[Route("/", handle, methods=["POST"])], middleware=[LOOPBACK_ONLY])


async def respond(methods: Methods, body: bytes) -> RpcResponse | list[RpcResponse] | None:
    """Return the response to one request body; None if it contains only notifications."""
    try:
        # py-evm raises the recursion limit so far that the json module can overflow the C stack.
        request = from_json(body)
    except ValueError:
        return _error(None, RpcError(PARSE_ERROR, "parse error: the body is not JSON"))
    if not isinstance(request, list):
        return await _one(methods, request)
    if not request:
        return _error(None, RpcError(INVALID_REQUEST, "empty batch"))
    if len(request) > MAX_BATCH:
        return _error(None, RpcError(INVALID_REQUEST, f"batch too large (limit {MAX_BATCH})"))
    replies = [await _one(methods, item) for item in request]
    return [reply for reply in replies if reply is not None] or None


async def _one(methods: Methods, request: Any) -> RpcResponse | None:
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        return _error(None, RpcError(INVALID_REQUEST, "invalid request"))
    request_id = request.get("id")
    if not isinstance(request_id, (str, int, float, type(None))):
        return _error(None, RpcError(INVALID_REQUEST, "invalid request: the id can't be an object"))
    params = request.get("params") or []
    if not isinstance(params, list):
        return _error(request_id, RpcError(INVALID_PARAMS, "non-array args"))
    try:
        result = await methods.call(request["method"], params)
    except RpcError as error:
        reply: RpcResponse = _error(request_id, error)
    except Exception as error:  # noqa: BLE001 - a failed request must get a response
        reply = _error(request_id, RpcError(INTERNAL_ERROR, f"internal error: {error!r}"[:500]))
    else:
        reply = {"jsonrpc": "2.0", "id": request_id, "result": result}
    return reply if "id" in request else None


def _error(identity: Any, error: RpcError) -> RpcResponse:
    return {"jsonrpc": "2.0", "id": identity, "error": error.to_wire()}


# -- the node in this process or in a child process

_READY_SECONDS = 30.0


class EmbeddedChain(Node):
    """The chain in this process: the EVM in one thread, the server on the running event loop.

    Args:
        port: Port on 127.0.0.1; 0 chooses a free one.
        block_time: Whole seconds between blocks; timestamps follow the wall clock. 0 mines a block
            as soon as there are transactions (timestamps may run ahead of the wall clock). None
            mines blocks only on request, with a clock that advances only on request.
    """

    def __init__(
        self, *, port: int = 0, chain_id: int = DEFAULT_CHAIN_ID, block_time: int | None = 1
    ) -> None:
        super().__init__(chain_id)
        if block_time is not None and block_time < 0:
            raise UsageError("A block time can't be negative.")
        self._port = port
        self._block_time = block_time
        self._worker: Worker | None = None
        self._server: LoopbackServer | None = None

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended block production, or None."""
        return self._worker.failure if self._worker else None

    async def start(self) -> None:
        """Start the chain; raises ``UsageError`` if the port is not available."""
        balances = {bytes.fromhex(a.address[2:]): DEV_BALANCE for a in dev_accounts()}
        core = Core(self.chain_id, balances, frozen=self._block_time is None)
        self._worker = Worker(core, self._block_time)
        self._server = LoopbackServer(rpc_app(Methods(self._worker)), self._port)
        await self._server.start()
        self._worker.start()
        self.url = self._server.url
        self.pid = os.getpid()

    async def stop(self) -> None:
        worker, server = self._worker, self._server
        self._worker = self._server = None
        if worker is not None:
            await asyncio.to_thread(worker.stop)
        if server is not None:
            await server.stop()


class ChainProcess(Node):
    """The embedded chain in a child process, which ends with this process."""

    def __init__(
        self, *, port: int = 0, chain_id: int = DEFAULT_CHAIN_ID, block_time: int | None = 1
    ) -> None:
        super().__init__(chain_id)
        self._port = port
        self._block_time = block_time
        self._child: ChildProcess | None = None

    async def start(self) -> None:
        """Start the chain.

        Raises ``UsageError`` if the port is not available, ``EndpointError`` if it did not start.
        """
        block_time = "manual" if self._block_time is None else str(self._block_time)
        self._child = await ChildProcess.spawn(
            [
                *(sys.executable, "-m", "deepsquare_chain.devnet.node.embedded"),
                *("--port", str(self._port), "--chain-id", str(self.chain_id)),
                *("--block-time", block_time, "--parent-pid", str(os.getpid())),
            ],
            stdout=asyncio.subprocess.PIPE,
            stderr=None,
        )
        try:
            ready = self._ready(await self._child.first_line(_READY_SECONDS))
        except BaseException:
            await self.stop()
            raise
        self.url = ready["url"]
        self.pid = self._child.pid

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    @staticmethod
    def _ready(line: bytes) -> dict[str, str]:
        """Parse the line that the child process prints when it is ready, or that reports an error."""
        try:
            ready = json.loads(line)
        except ValueError:
            ready = None
        if not isinstance(ready, dict):
            raise EndpointError(
                "The embedded chain did not start.", hint="Its output is on standard error."
            )
        if "error" in ready:
            raise UsageError(ready["error"], hint=ready.get("hint", ""))
        return ready


async def _serve(arguments: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    orphaned = _orphan_check(arguments.parent_pid)
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    chain = EmbeddedChain(
        port=arguments.port, chain_id=arguments.chain_id, block_time=arguments.block_time
    )
    async with chain:
        ready = {"event": "ready", "url": chain.url, "chain_id": chain.chain_id, "pid": chain.pid}
        print(json.dumps(ready), flush=True)  # noqa: T201 - the ready line
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
            if chain.failure is not None:
                return 1
            if orphaned():
                return 0
    return 0


def _orphan_check(parent: int) -> Callable[[], bool]:
    """Return a function that returns whether the process ``parent`` (0: none) has ended."""
    if not parent:
        return lambda: False
    if os.getppid() == parent:  # also correct while the parent is a zombie
        return lambda: os.getppid() != parent
    return lambda: not psutil.pid_exists(parent)


def _block_time(text: str) -> int | None:
    return None if text == "manual" else int(text)


def main() -> int:
    """Run the chain until SIGINT or SIGTERM; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deepsquare_chain.devnet.node.embedded")
    parser.add_argument("--port", type=int, default=8545, help="on 127.0.0.1; 0: a free one")
    parser.add_argument("--chain-id", type=int, default=DEFAULT_CHAIN_ID)
    parser.add_argument(
        "--block-time",
        type=_block_time,
        default=1,
        help="seconds; 0: at once; 'manual': on request",
    )
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process has ended")
    try:
        return asyncio.run(_serve(parser.parse_args()))
    except GridError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}), flush=True)  # noqa: T201
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
