"""The floor: what an answer costs when nothing is there but the work itself.

    python -m benchmarks.serving.floor --model DIR --feature-store DIR --redis HOST:PORT --port PORT

A bare ASGI application under uvicorn (uvloop, httptools, no access log), orjson in and out. A user is one packed value
in Redis (`pack`), read by one GET over one connection; scores are `SplitScorer`'s, the items' half is ready. Nothing is
checked, logged, counted or refused; there is no KServe, no deadline, and items are never refreshed. It is what the
served model is measured against, not a server to put anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import datetime
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
import orjson
import pyarrow as pa
import redis
import torch
import uvicorn
from numpy.typing import NDArray

from evergreen.contracts.training_set import FeatureOrigin
from evergreen.features.request import ELAPSED_FEATURES
from evergreen.features.store import FeatureStore
from evergreen.models.package import ModelPackage
from evergreen.models.split.request import PairColumns
from evergreen.models.split.scorer import SplitScorer

Message = MutableMapping[str, Any]

_SERVICE = "ranker_v1"
_PREFIX = b"floor:"
_JSON = [(b"content-type", b"application/json")]
_USER_TIMES = {name: stored for name, stored in ELAPSED_FEATURES.items() if stored.startswith("user_")}
_ITEM_TIMES = {name: stored for name, stored in ELAPSED_FEATURES.items() if stored.startswith("item_")}


def pack(values: dict[str, Any], by_category: NDArray[np.float64]) -> bytes:
    """One user as one value: the (num_categories, num_features) numbers, then everything else as JSON."""
    return by_category.tobytes() + orjson.dumps(values)


def unpack(value: bytes, shape: tuple[int, int]) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """What `pack` was given."""
    size = shape[0] * shape[1]
    return orjson.loads(value[8 * size :]), np.frombuffer(value, np.float64, size).reshape(shape)


def pack_users(store: FeatureStore, package: ModelPackage, users: list[str], redis_address: str) -> None:
    """Write each user's features, as Feast gives them, under one key each."""
    categories = store.categories()
    names = _pair_names(package)
    found = store.online(
        _SERVICE,
        pa.table(
            {
                "user_id": [user for user in users for _ in categories],
                "category": categories * len(users),
            }
        ),
    )
    matrix = np.column_stack([found[name].cast(pa.float64()).to_numpy() for name in names])
    of_user = [name for name in found.column_names if name not in ("category", *names)]
    rows = found.select(of_user).take(np.arange(0, found.num_rows, len(categories)))
    client = redis.Redis.from_url(f"redis://{redis_address}")
    for place, row in enumerate(rows.to_pylist()):
        plain = {name: int(v.timestamp()) if isinstance(v, datetime) else v for name, v in row.items()}
        block = matrix[place * len(categories) : (place + 1) * len(categories)]
        client.set(_PREFIX + row["user_id"].encode(), pack(plain, block))


def _pair_names(package: ModelPackage) -> tuple[str, ...]:
    return tuple(f.name for f in package.info.features if f.origin is FeatureOrigin.USER_CATEGORY)


class RedisConnection(asyncio.Protocol):
    """GET over one connection, with replies in the order of the calls."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[bytes | None]] = deque()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._waiting.popleft().set_result(reply)

    def get(self, key: bytes) -> asyncio.Future[bytes | None]:
        reply = self._loop.create_future()
        self._waiting.append(reply)
        self._transport.write(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        return reply


class Floor:
    """The application."""

    def __init__(self, package: ModelPackage, store: FeatureStore, redis_address: str) -> None:
        catalogue = store.items().select(["item_id", "category"])
        items = store.online(_SERVICE, catalogue.select(["item_id"])).combine_chunks()
        categories = store.categories()
        place = {category: number for number, category in enumerate(categories)}
        self._scorer = SplitScorer.prepare(package, items)
        self._ids: list[str] = items["item_id"].to_pylist()
        self._rows = {item: row for row, item in enumerate(self._ids)}
        self._category_of = np.array([place[category] for category in catalogue["category"].to_pylist()])
        self._times = np.column_stack([_unix_seconds(items[stored]) for stored in _ITEM_TIMES.values()])
        self._names, self._elapsed = _pair_names(package), tuple(_ITEM_TIMES)
        self._shape = (len(categories), len(self._names))
        nobody = store.online(_SERVICE, pa.table({"user_id": [""]})).column_names
        self._nobody = (dict.fromkeys(nobody), np.full(self._shape, np.nan))
        self._context = {f.name: None for f in package.info.features if f.origin is FeatureOrigin.CONTEXT}
        self._version = package.version
        self._redis = redis_address.split(":")
        self._connection: RedisConnection

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            await receive()
            host, port = self._redis
            _, self._connection = await asyncio.get_running_loop().create_connection(RedisConnection, host, int(port))
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["method"] == "GET":  # whether it is ready
            body = b"{}"
        else:
            message = await receive()
            body = message["body"]
            while message.get("more_body"):
                message = await receive()
                body += message["body"]
            instances = orjson.loads(body)["instances"]
            body = orjson.dumps({"predictions": [await self._answer(instance) for instance in instances]})
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON, length]})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, instance: dict[str, Any]) -> dict[str, Any]:
        user_id, candidates = instance["user_id"], instance["candidates"]
        packed = await self._connection.get(_PREFIX + user_id.encode())
        values, by_category = self._nobody if packed is None else unpack(packed, self._shape)
        now = int(datetime.fromisoformat(instance["event_timestamp"]).timestamp())
        user = values | self._context | instance["context"]
        user["user_id"] = user_id
        user["hour"], user["weekday"] = str(now // 3600 % 24), str((now // 86400 + 3) % 7)
        for name, stored in _USER_TIMES.items():
            then = values[stored]
            user[name] = None if then is None else max(now - then, 0)
        index = self._rows
        rows = np.array([index[item] for item in candidates])
        pairs = [
            PairColumns(self._names, by_category, self._category_of[rows]),
            PairColumns(self._elapsed, np.maximum(now - self._times[rows], 0.0)),
        ]
        scores = self._scorer.score(user, pairs, rows)
        order = np.lexsort((rows, -scores))  # rows are in the order of the ids
        ranked = zip(rows[order].tolist(), scores[order].tolist(), strict=True)
        ids = self._ids
        return {
            "request_id": uuid.uuid4().hex,
            "user_id": user_id,
            "known_user": packed is not None,
            "items": [
                {"item_id": ids[row], "rank": rank, "probability": score}
                for rank, (row, score) in enumerate(ranked, start=1)
            ],
            "model_version": self._version,
            "event_timestamp": instance["event_timestamp"],
        }


def _unix_seconds(times: pa.ChunkedArray) -> NDArray[np.float64]:
    """Whole seconds, nan where there is no time."""
    seconds = times.cast(pa.timestamp("s"), safe=False).cast(pa.int64()).cast(pa.float64())
    values: NDArray[np.float64] = seconds.to_numpy()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--feature-store", type=Path, required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    app = Floor(ModelPackage.load(arguments.model), FeatureStore.open(arguments.feature_store), arguments.redis)
    gc.collect()
    gc.freeze()
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
