"""How an input is changed: any bytes, JSON by its tree, protobuf by its fields. The same random numbers give the same bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message

LARGEST = 1 << 20  # bytes of an input
Mutator = Callable[[bytes, Random], bytes]

NUMBERS = (
    0, -1, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 70,
    10**400, -(1 << 63), 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "0", "-1", "nan", "1e999", "..", "../../etc/passwd", "/etc/passwd", "a/../b", "C:\\x", ".hidden", "\0",
    "a\0b", "\n", "\x1b[2J", "\ud800", "\u202e", "x" * 300, "x" * 5000, "{question}", "%s%n", "{0.__class__}", "F32", "BF16",
    "I64", "F4", "silu", "modes", "__metadata__", "__class__", "é" * 90, "0" * 64,
)  # fmt: skip


def hostile(rng: Random) -> Any:
    """One value that a careless reader trips over."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind == 6:
        return rng.choice([None, True, False, [], {}])
    deep: Any = rng.choice([[], {}, 1])
    for _ in range(rng.choice([1, 3, 200])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left:
        node = left.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((node, key))
            left.append(value)
    return found


def _change_tree(tree: Any, rng: Random) -> Any:
    places = _places(tree)
    if not places or rng.random() < 0.02:
        return hostile(rng)
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action <= 1:
        node[key] = hostile(rng)
    elif action == 2:
        del node[key]
    elif action == 3:
        other, name = rng.choice(places)
        node[key] = json.loads(json.dumps(other[name]))
    elif action == 4:
        extra = node[key] if rng.random() < 0.5 else hostile(rng)
        if isinstance(node, list):
            node.extend([extra] * rng.choice([1, 2, 300]))
        else:
            node[rng.choice(TEXTS) if rng.random() < 0.5 else str(key) + "_"] = extra
    else:
        value = node[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            node[key] = rng.choice(
                [value + 1, value - 1, -value, value * 2, value / 3 if abs(value) < 1e300 else 0.5, str(value)]
            )
        elif isinstance(value, str):
            node[key] = value[: rng.randrange(len(value) + 1)] + rng.choice(TEXTS)
        elif isinstance(value, list):
            rng.shuffle(value)
    return tree


def _encoded(tree: Any, rng: Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")[:LARGEST]


def any_bytes(data: bytes, rng: Random) -> bytes:
    """Flipped, overwritten, inserted, cut out, repeated, truncated: one to four times."""
    found = bytearray(data or b"\0")
    for _ in range(1 + rng.randrange(4)):
        at, size = rng.randrange(len(found)), 1 + rng.randrange(16)
        action = rng.randrange(7)
        if action == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            found[at : at + size] = rng.randbytes(size)
        elif action == 2:
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice([0, 1, (1 << 8 * width - 1) - 1, 1 << 8 * width - 1, (1 << 8 * width) - 1, len(data)])
            found[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little" if rng.random() < 0.7 else "big")
        elif action == 3:
            found[at:at] = rng.randbytes(size)
        elif action == 4:
            del found[at : at + size * rng.choice([1, 8])]
        elif action == 5:
            piece = found[at : at + size * rng.choice([1, 16])]
            found[at:at] = piece * rng.choice([1, 2, 50])
        else:
            del found[at:]
        found = found or bytearray(b"\0")
    return bytes(found[:LARGEST])


def as_json(data: bytes, rng: Random) -> bytes:
    """By the tree, mostly; else as bytes."""
    if rng.random() < 0.15:
        return any_bytes(data, rng)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return any_bytes(data, rng)
    for _ in range(1 + rng.randrange(3)):
        tree = _change_tree(tree, rng)
    try:
        return _encoded(tree, rng)
    except (ValueError, RecursionError):
        return any_bytes(data, rng)


def as_json_lines(data: bytes, rng: Random) -> bytes:
    """One of the lines."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = as_json(lines[at], rng)
    return b"\n".join(lines)[:LARGEST]


def as_safetensors(data: bytes, rng: Random) -> bytes:
    """The header by its tree, with a length that mostly fits; or the values; or any bytes."""
    if rng.random() < 0.2 or len(data) < 10:
        return any_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.25 and body:
        body = any_bytes(body, rng) if rng.random() < 0.3 else _special_floats(body, rng)
    else:
        header = as_json(header, rng)
    if rng.random() < 0.05:
        return struct.pack("<Q", rng.choice([0, 1, len(header) + 1, 1 << 63, (1 << 64) - 1])) + header + body
    return struct.pack("<Q", len(header)) + header + body


def _special_floats(body: bytes, rng: Random) -> bytes:
    at = rng.randrange(max(1, len(body) // 4)) * 4
    value = struct.pack("<f", rng.choice([float("nan"), float("inf"), -1.0, -0.0, 1e-45, 3e38, 0.5]))
    return body[:at] + value + body[at + 4 :]


def as_onnx(data: bytes, rng: Random) -> bytes:
    """A field of the model, mostly; else as bytes."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return any_bytes(data, rng)
    if rng.random() < 0.15:
        return any_bytes(data, rng)
    for _ in range(1 + rng.randrange(3)):
        _change_message(_some_message(model, rng), rng)
    return bytes(model.SerializeToString(deterministic=True))[:LARGEST]


def _some_message(message: Message, rng: Random) -> Message:
    while True:
        inner: list[Message] = []
        for field, value in message.ListFields():
            if field.message_type is not None:
                inner.extend([value] if isinstance(value, Message) else list(value)[:64])
        if not inner or rng.random() < 0.15:
            return message
        message = rng.choice(inner)


def _change_message(message: Message, rng: Random) -> None:
    fields = message.DESCRIPTOR.fields
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present) if present and rng.random() < 0.7 else rng.choice(list(fields))
    values = getattr(message, field.name)
    repeated = hasattr(values, "append") or hasattr(values, "add")
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None:
        if not repeated:
            values.SetInParent()
        elif len(values) and rng.random() < 0.5:
            values.add().CopyFrom(rng.choice(list(values)))
        else:
            values.add()
    else:
        kind = field.cpp_type
        value: Any
        if kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_UINT64, field.CPPTYPE_ENUM, field.CPPTYPE_UINT32):
            value = rng.choice(
                [0, 1, 2, 7, 13, 16, 22, 64, 127, (1 << 31) - 1, *([] if kind != field.CPPTYPE_INT64 else [-1, 1 << 62])]
            )
        elif kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            value = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
        elif field.type == field.TYPE_BYTES:
            value = rng.choice([b"", b"\0", rng.randbytes(16), b"x" * 5000])
        else:
            value = rng.choice([text for text in TEXTS if text != "\ud800"])
        try:
            if not repeated:
                setattr(message, field.name, value)
            elif len(values) and rng.random() < 0.6:
                values[rng.randrange(len(values))] = value
            else:
                values.append(value)
        except (ValueError, TypeError):  # an enumerator that does not exist: the field stays
            return
