"""Calls that are wrong, of every kind that we could think of, made from a seed.

All are wrong in a way that a server can name, so an answer of 2xx is as much a failure as one of 5xx; except `mutated`
ones, good calls with some bytes changed, which may still be good. What is too large has a status of its own, 413.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from benchmarks.serving.load import V1_PATH, V2_PATH, http_request
from benchmarks.serving.requests import HEADER_LENGTH, bytes_tensor

_TOO_LARGE = 5 * 1024 * 1024
_BINARY = "application/octet-stream"
_TIME = "2026-03-01T12:00:00+00:00"


@dataclass(frozen=True)
class BadCall:
    """A whole HTTP request, and what is wrong with it.

    Attributes:
        kind: which of Maker's methods made it.
        data: bytes to send.
    """

    kind: str
    data: bytes

    def is_answered_rightly(self, status: int) -> bool:
        """Whether the status may be the answer."""
        if self.kind == "too_large":
            return status == 413
        return 400 <= status < 500 or (self.kind == "mutated" and status == 200)


class Maker:
    """Makes bad calls out of good ones."""

    def __init__(self, seed: int, users: Sequence[str], items: Sequence[str]) -> None:
        self._rng = random.Random(seed)
        self._users, self._items = list(users), list(items)

    def good(self) -> dict[str, Any]:
        """A V1 instance that is right."""
        rng = self._rng
        return {
            "user_id": rng.choice(self._users),
            "candidates": rng.sample(self._items, min(rng.randint(1, 30), len(self._items))),
            "k": rng.randint(1, 20),
            "event_timestamp": _TIME,
        }

    def good_tensors(self) -> list[dict[str, Any]]:
        """V2 tensors that are right, as JSON."""
        instance = self.good()
        candidates = instance["candidates"]
        return [
            {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": [instance["user_id"]]},
            {"name": "candidates", "datatype": "BYTES", "shape": [1, len(candidates)], "data": candidates},
            {"name": "k", "datatype": "INT64", "shape": [1], "data": [instance["k"]]},
            {"name": "event_timestamp", "datatype": "BYTES", "shape": [1], "data": [_TIME]},
        ]

    # --- V1 ---

    def wrong_type(self) -> bytes:
        """A field of a type that it cannot have."""
        field_name, values = self._rng.choice(
            [
                ("user_id", [7, 1.5, True, [], {}, ["u"]]),
                ("candidates", ["i1", 3, {}, True, {"0": "i1"}]),
                ("k", ["5", 1.5, True, [], {}, [3]]),
                ("context", [[], "device", 5, True, [["device", "phone"]]]),
                ("event_timestamp", [1767225600, 1.5, True, [], {}]),
                ("request_id", [7, [], {}, True]),
                ("exclude_seen", ["true", 1, 0, [], {}]),
                ("diversity", ["0.5", [], {}, True]),
            ]
        )
        return self._v1({field_name: self._rng.choice(values)})

    def wrong_value(self) -> bytes:
        """A value out of its range."""
        field_name, values = self._rng.choice(
            [
                ("user_id", ["", "a\x00b", "\x00"]),
                ("candidates", [[], [""], [None], [1], [[]], ["i1", "i1"], ["a\x00"], [{}], ["i1", 2.5]]),
                ("k", [0, -1, 501, -(2**31), 2**31, 2**63, -(2**63), 2**64 - 1]),
                ("context", [{"no such feature": 1}, {"": "x"}, {"device": 5}, {"device": ["x"]}, {"device": {}}]),
                ("event_timestamp", ["", "now", "2026-13-45T00:00:00Z", "2026-01-01", "2026-01-01T00:00:00"]),
                ("event_timestamp", ["1969-12-31T23:59:59Z", "2200-01-01T00:00:00Z", "2026-01-01T25:00:00Z"]),
                ("request_id", ["", "a\x00b"]),
                ("diversity", [-0.1, 1.1, 2, -1, 1e300]),
                ("no_such_field", [1, "x", None]),
                ("User_id", ["x"]),
            ]
        )
        return self._v1({field_name: self._rng.choice(values)})

    def no_number(self) -> bytes:
        """NaN, infinities and numbers that are none in JSON."""
        literal = self._rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "0x10", "01", "+1", ".5", "1."])
        where = self._rng.choice(["k", "diversity", "user_id", "candidates", "event_timestamp"])
        return self._post(self._v1_text(where, literal))

    def huge_number(self) -> bytes:
        """A number of many digits."""
        digits = self._rng.randint(20, 20_000)
        return self._post(self._v1_text(self._rng.choice(["k", "diversity"]), "9" * digits))

    def too_many(self) -> bytes:
        """More than there may be of something."""
        what = self._rng.randrange(4)
        if what == 0:
            return self._v1({"candidates": [f"x{n}" for n in range(self._rng.randint(501, 20_000))]})
        if what == 1:
            return self._v1({"context": {f"c{n}": "x" for n in range(self._rng.randint(1, 3_000))}})
        instances = [self.good() for _ in range(self._rng.choice([0, 65, 100, 1_000]))]
        return self._post(orjson.dumps({"instances": instances}))

    def long_text(self) -> bytes:
        """An identifier that is too long."""
        text = self._rng.choice("aé漢") * self._rng.randint(1_001, 100_000)
        return self._v1(self._rng.choice([{"user_id": text}, {"candidates": [text]}, {"request_id": text}]))

    def deep(self) -> bytes:
        """Nested beyond reason."""
        depth = self._rng.randint(50, 100_000)
        opening, inner, closing = self._rng.choice([("[", "", "]"), ('{"a":', "1", "}"), ('[{"a":', "1", "}]")])
        deep = opening * depth + (inner + closing * depth if self._rng.random() < 0.7 else "")
        where = self._rng.randrange(3)
        if where == 0:
            return self._post(deep.encode())
        if where == 1:
            return self._post(f'{{"instances": {deep}}}'.encode())
        return self._post(self._v1_text("context", deep))

    def wrong_envelope(self) -> bytes:
        """A body that is no object with a list of instances."""
        instance = self.good()
        bodies: list[Any] = [
            None, True, 5, "x", [], {}, [instance], {"instances": None}, {"instances": {}}, {"instances": "x"},
            {"instances": 3}, {"instances": [None]}, {"instances": [[]]}, {"instances": ["x"]}, {"instances": [5]},
            {"instance": [instance]}, {"inputs": [instance]}, instance, {"instances": [instance, 1]},
        ]  # fmt: skip
        return self._post(orjson.dumps(self._rng.choice(bodies)))

    def last_one_counts(self) -> bytes:
        """A key given twice, the second time wrong. JSON leaves open which one counts; parsers take the last."""
        good = orjson.dumps({"instances": [self.good()]})
        if self._rng.random() < 0.5:
            return self._post(good[:-1] + b', "instances": ' + self._rng.choice([b"null", b"[]", b"3", b"[3]"]) + b"}")
        return self._post(
            good[:-3] + self._rng.choice([b', "k": 0', b', "user_id": 5', b', "candidates": []']) + b"}]}"
        )

    def cut_short(self) -> bytes:
        """A body that ends in the middle, and says so in its length."""
        body = orjson.dumps({"instances": [self.good()]})
        return self._post(body[: self._rng.randrange(len(body))])

    def no_json(self) -> bytes:
        """Anything else."""
        noise = self._rng.randbytes(self._rng.randint(1, 400))
        texts = [
            b"{'instances': []}",
            b"instances=1",
            b"<xml/>",
            b"{]",
            b"\xef\xbb\xbf{}",
            b"//",
            b"{,}",
            b"\x00",
            noise,
        ]
        return self._post(self._rng.choice(texts))

    def bad_text(self) -> bytes:
        """Bytes that are no UTF-8, and halves of surrogate pairs."""
        raw = self._rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\\ud800", b"\\udfff!"])
        where = self._rng.choice([{"user_id": "MARK"}, {"candidates": ["i", "MARK"]}, {"request_id": "MARK"}])
        return self._post(orjson.dumps({"instances": [self.good() | where]}).replace(b"MARK", raw))

    def no_user(self) -> bytes:
        """Nobody asks."""
        return self._v1({"user_id": None})

    # --- HTTP ---

    def wrong_content_type(self) -> bytes:
        """Something that says of itself that it is no JSON."""
        kind = self._rng.choice(
            ["text/xml", "image/png", "multipart/form-data; boundary=x", "application/pdf", "video/a"]
        )
        path = self._rng.choice([V1_PATH, V2_PATH])
        return http_request(path, orjson.dumps({"instances": [self.good()]}), {"Content-Type": kind})

    def wrong_address(self) -> bytes:
        """A model, path or method that is not there."""
        body = orjson.dumps({"instances": [self.good()]})
        path = self._rng.choice(
            [
                "/v1/models/nobody:predict",
                "/v2/models/nobody/infer",
                "/v1/models/evergreen:forecast",
                "/v3/models",
                "/",
                "/v1/models/../../etc/passwd:predict",
                "/%2e%2e/%2e%2e/etc/passwd",
                "/v1/models/evergreen%00:predict",
                "/v2/models/" + "a" * self._rng.randint(100, 5_000) + "/infer",
            ]
        )
        method = self._rng.choice([b"POST", b"PUT", b"DELETE", b"PATCH"])
        if path == "/":
            method = b"DELETE"
        return http_request(path, body).replace(b"POST", method, 1)

    def wrong_http(self) -> bytes:
        """Lines that are no HTTP."""
        noise = self._rng.randbytes(60).replace(b"\n", b"").replace(b"\r", b"")
        lines = [
            b"HELLO\r\n\r\n",
            b"POST\r\n\r\n",
            b"POST / HTTP/9.9\r\n\r\n",
            b"POST " + V1_PATH.encode() + b" HTTP/1.1\r\nno colon\r\n\r\n",
            b"POST " + V1_PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n{}",
            b"POST " + V1_PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
            b"POST "
            + V1_PATH.encode()
            + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            b"\x16\x03\x01" + noise + b"\r\n\r\n",
        ]
        return self._rng.choice(lines)

    def chunked(self) -> bytes:
        """A wrong body that comes in chunks."""
        body = self._rng.choice([b"{}", b"[1]", b'{"instances": [{}]}', b'{"instances"'])
        return _in_chunks(body, self._rng.randint(1, 8))

    def too_large(self) -> bytes:
        """A body beyond the limit, by its length or in chunks."""
        body = b'{"instances": ["' + b"x" * _TOO_LARGE + b'"]}'
        return self._post(body) if self._rng.random() < 0.5 else _in_chunks(body, 65_536)

    # --- V2 ---

    def wrong_inputs(self) -> bytes:
        """V2: a body without a list of tensors."""
        tensors = self.good_tensors()
        bodies: list[Any] = [
            None, [], 5, {}, {"inputs": None}, {"inputs": []}, {"inputs": {}}, {"inputs": [None]}, {"inputs": ["x"]},
            {"inputs": [[]]}, {"inputs": [{}]}, {"input": tensors}, {"instances": [self.good()]},
            {"inputs": tensors, "outputs": [{"name": "nothing"}]}, {"inputs": tensors, "outputs": [3]},
            {"inputs": tensors, "outputs": 5}, {"inputs": tensors, "parameters": 7},
            {"inputs": [*tensors, tensors[0]]}, {"inputs": tensors, "id": 5},
        ]  # fmt: skip
        return self._infer(self._rng.choice(bodies))

    def wrong_tensor(self) -> bytes:
        """V2: a tensor that lacks a part, or has one that does not fit."""
        tensors = self.good_tensors()
        tensor = self._rng.choice(tensors)
        part = self._rng.choice(["name", "datatype", "shape", "data"])
        values: dict[str, list[Any]] = {
            "name": [None, 5, "", "nothing", "USER_ID", [], "a" * 5_000],
            "datatype": [None, 5, "", "STRING", "FP8", "bytes", [], "BOOL"],
            "shape": [
                None,
                5,
                "1",
                [],
                [0],
                [-1],
                [2],
                [1, 2, 3],
                [1.5],
                ["1"],
                [None],
                [2**40],
                [-(2**63)],
                [1] * 500,
            ],
            "data": [None, 5, "x", {}, [None], [{}], [[[]]], [["a"], ["b", "c"]]],
        }
        if self._rng.random() < 0.2:
            del tensor[part]
        else:
            tensor[part] = self._rng.choice(values[part])
        return self._infer({"inputs": tensors})

    def wrong_shape(self) -> bytes:
        """V2: shapes that the data do not fill, or that differ between tensors."""
        tensors = self.good_tensors()
        for tensor in tensors:
            if tensor["name"] == "candidates":
                rows, width = tensor["shape"]
                wrong = [[rows, width + 1], [rows + 1, width], [width, rows + 1], [rows, 2**31], [2**31, 2**31]]
                tensor["shape"] = self._rng.choice(wrong)
        return self._infer({"inputs": tensors})

    def binary_header(self) -> bytes:
        """V2 binary: a length of the JSON part that cannot be."""
        head, blocks = self._binary()
        length = self._rng.choice(
            ["", "x", "-1", "1e3", "0", str(len(head) + len(blocks) + 1), "9" * 30, str(len(head) - 1), "1.5", "0x20"]
        )
        return http_request(V2_PATH, head + blocks, {"Content-Type": _BINARY, HEADER_LENGTH: length})

    def binary_size(self) -> bytes:
        """V2 binary: a size of a block that cannot be."""
        sizes = [-1, 2**31, 2**63, "8", None, 1.5, [], True, 1_000_000]
        head, blocks = self._binary(size=self._rng.choice(sizes))
        return self._post_binary(head, blocks)

    def binary_block(self) -> bytes:
        """V2 binary: a block that is cut short, too long, or holds what its type cannot."""
        head, blocks = self._binary()
        what = self._rng.randrange(4)
        if what == 0:
            blocks = blocks[: self._rng.randrange(len(blocks))]
        elif what == 1:
            blocks += self._rng.randbytes(self._rng.randint(1, 50))
        elif what == 2:  # a string that is longer than its block
            blocks = struct.pack("<I", self._rng.choice([2**32 - 1, 2**31, 10_000])) + blocks[4:]
        else:
            text = self._rng.choice([b"\xff\xfe", b"\xed\xa0\x80", b"a\x00b", b""])
            blocks = struct.pack("<I", len(text)) + text
            tensor = {"name": "user_id", "datatype": "BYTES", "shape": [1]}
            head = orjson.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(blocks)}}]})
        return self._post_binary(head, blocks)

    def binary_number(self) -> bytes:
        """V2 binary: numbers that no request may hold."""
        name, datatype, block = self._rng.choice(
            [
                ("diversity", "FP32", struct.pack("<f", float("nan"))),
                ("diversity", "FP32", struct.pack("<f", float("inf"))),
                ("diversity", "FP64", struct.pack("<d", -1.0)),
                ("diversity", "FP32", b"\x00\x00"),
                ("k", "INT64", struct.pack("<q", 0)),
                ("k", "INT64", struct.pack("<q", -(2**63))),
                ("k", "INT64", b"\x01"),
                ("k", "FP32", struct.pack("<f", 3.0)),
                ("exclude_seen", "BOOL", b""),
                ("exclude_seen", "BOOL", b"\x01\x01"),
            ]
        )
        user = bytes_tensor([self._rng.choice(self._users)])
        inputs = [
            {"name": "user_id", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(user)}},
            {"name": name, "datatype": datatype, "shape": [1], "parameters": {"binary_data_size": len(block)}},
        ]
        return self._post_binary(orjson.dumps({"inputs": inputs}), user + block)

    def mutated(self) -> bytes:
        """A good call with some bytes of its body changed."""
        head, blocks = self._binary()
        call = self._rng.choice(
            [
                self._post(orjson.dumps({"instances": [self.good()]})),
                self._infer({"inputs": self.good_tensors()}),
                self._post_binary(head, blocks),
            ]
        )
        start = call.index(b"\r\n\r\n") + 4
        data = bytearray(call)
        for _ in range(self._rng.randint(1, 5)):
            data[self._rng.randrange(start, len(data))] = self._rng.randrange(256)
        return bytes(data)

    # --- how they are written ---

    def _v1(self, changes: dict[str, Any]) -> bytes:
        return self._post(orjson.dumps({"instances": [self.good() | changes]}))

    def _v1_text(self, name: str, literal: str) -> bytes:
        body = orjson.dumps({"instances": [self.good() | {name: "MARK"}]})
        return body.replace(b'"MARK"', literal.encode())

    def _post(self, body: bytes) -> bytes:
        return http_request(V1_PATH, body)

    def _infer(self, body: Any) -> bytes:
        return http_request(V2_PATH, orjson.dumps(body))

    def _binary(self, size: Any = ...) -> tuple[bytes, bytes]:
        """JSON part and blocks; `size` takes the place of one block's size."""
        inputs, blocks = [], []
        for tensor in self.good_tensors():
            data = tensor.pop("data")
            blocks.append(bytes_tensor(data) if tensor["datatype"] == "BYTES" else np.array(data, "<i8").tobytes())
            inputs.append(tensor | {"parameters": {"binary_data_size": len(blocks[-1])}})
        if size is not ...:
            self._rng.choice(inputs)["parameters"]["binary_data_size"] = size
        return orjson.dumps({"inputs": inputs}), b"".join(blocks)

    def _post_binary(self, head: bytes, blocks: bytes) -> bytes:
        return http_request(V2_PATH, head + blocks, {"Content-Type": _BINARY, HEADER_LENGTH: str(len(head))})


KINDS = tuple(name for name in vars(Maker) if not name.startswith(("_", "good")))


def bad_calls(
    count: int, *, seed: int = 0, users: Sequence[str] = ("u1",), items: Sequence[str] = ("i1", "i2")
) -> Iterator[BadCall]:
    """Bad calls of every kind in turn; equal arguments give equal calls.

    Args:
        count: how many.
        seed: of the values.
        users: known to the server, for what is right about a call.
        items: of its catalogue.
    """
    maker = Maker(seed, users, items)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        yield BadCall(kind, getattr(maker, kind)())


def _in_chunks(body: bytes, size: int) -> bytes:
    head = f"POST {V1_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [body[place : place + size] for place in range(0, len(body), size)]
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
