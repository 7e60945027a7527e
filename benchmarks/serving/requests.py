"""Requests in every protocol of the server, and its answers read back."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import orjson

from benchmarks.serving.load import V1_PATH, V2_PATH, Reply, header_number, http_request

DEVICES = ("phone", "tablet", "desktop")
_NUMPY = {"FP32": "<f4", "INT64": "<i8", "BOOL": "?"}
HEADER_LENGTH = "Inference-Header-Content-Length"

Scores = dict[str, float]
"""Item id to score, best first."""


@dataclass(frozen=True)
class Asked:
    """One request, before it is written in a protocol."""

    user_id: str
    candidates: tuple[str, ...] | None
    device: str
    event_timestamp: datetime
    k: int | None = None

    def v1(self) -> bytes:
        """As a V1 call."""
        instance = {
            "user_id": self.user_id,
            "candidates": self.candidates,
            "k": self.k,
            "context": {"device": self.device},
            "event_timestamp": self.event_timestamp.isoformat(),
        }
        given = {name: value for name, value in instance.items() if value is not None}
        return http_request(V1_PATH, orjson.dumps({"instances": [given]}))

    def v2_json(self) -> bytes:
        """As a V2 call whose tensors are JSON."""
        inputs = [
            {"name": name, "datatype": datatype, "shape": shape, "data": data}
            for name, datatype, shape, data in self._tensors()
        ]
        return http_request(V2_PATH, orjson.dumps({"inputs": inputs}))

    def v2_binary(self) -> bytes:
        """As a V2 call whose tensors are binary, which asks for binary ones back."""
        inputs, blocks = [], []
        for name, datatype, shape, data in self._tensors():
            block = bytes_tensor(data) if datatype == "BYTES" else np.array(data, "<i8").tobytes()
            parameters = {"binary_data_size": len(block)}
            inputs.append({"name": name, "datatype": datatype, "shape": shape, "parameters": parameters})
            blocks.append(block)
        head = orjson.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}})
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
        return http_request(V2_PATH, b"".join([head, *blocks]), headers)

    def _tensors(self) -> list[tuple[str, str, list[int], list[Any]]]:
        context = orjson.dumps({"device": self.device}).decode()
        tensors: list[tuple[str, str, list[int], list[Any]]] = [
            ("user_id", "BYTES", [1], [self.user_id]),
            ("context", "BYTES", [1], [context]),
            ("event_timestamp", "BYTES", [1], [self.event_timestamp.isoformat()]),
        ]
        if self.candidates is not None:
            tensors.append(("candidates", "BYTES", [1, len(self.candidates)], list(self.candidates)))
        if self.k is not None:
            tensors.append(("k", "INT64", [1], [self.k]))
        return tensors


def make_requests(
    users: Sequence[str],
    items: Sequence[str],
    size: int | None,
    count: int,
    at: datetime,
    *,
    k: int | None = None,
    seed: int = 0,
) -> list[Asked]:
    """Requests of different users with different candidates, within an hour; always the same.

    Args:
        users: who asks.
        items: the catalogue.
        size: candidates of a request; None: it brings none.
        count: how many requests.
        at: the moment of the first one.
        k: how many items are to be returned; None: all candidates.
        seed: of who asks what.
    """
    rng = random.Random(seed * 1_000 + (size or 0))
    return [
        Asked(
            user_id=rng.choice(users),
            candidates=None if size is None else tuple(rng.sample(items, size)),
            device=rng.choice(DEVICES),
            event_timestamp=at + timedelta(seconds=rng.randrange(3_600)),
            k=k,
        )
        for _ in range(count)
    ]


def bytes_tensor(values: Sequence[str]) -> bytes:
    """Strings as the data of a binary BYTES tensor."""
    return b"".join(struct.pack("<I", len(raw)) + raw for raw in (value.encode() for value in values))


def read_v1(reply: Reply) -> Scores:
    """The first prediction of a V1 answer."""
    items = orjson.loads(reply.body)["predictions"][0]["items"]
    return {item["item_id"]: item["probability"] for item in items}


def read_v2(reply: Reply) -> Scores:
    """The first answer of a V2 one, in JSON or binary."""
    end = header_number(reply.head, HEADER_LENGTH.lower().encode())
    head, data = orjson.loads(reply.body[:end]), reply.body[end or len(reply.body) :]
    values: dict[str, Sequence[Any]] = {}
    for output in head["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values[output["name"]] = output["data"]
            continue
        block, data = data[:size], data[size:]
        datatype = output["datatype"]
        values[output["name"]] = _strings(block) if datatype == "BYTES" else np.frombuffer(block, _NUMPY[datatype])
    count = int(values["num_items"][0])
    return {item: float(score) for item, score in zip(values["item_id"][:count], values["probability"], strict=False)}


def _strings(block: bytes) -> list[str]:
    texts, place = [], 0
    while place < len(block):
        (size,) = struct.unpack_from("<I", block, place)
        texts.append(block[place + 4 : place + 4 + size].decode())
        place += 4 + size
    return texts
