"""Messages that are random, almost right, or right: from protobuf descriptors, and from bytes that were valid once."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

GOLDEN = Path(__file__).parents[1] / "golden_messages.json"
_INTEGERS = (0, 1, 2, 7, 16, 127, 128, 255, 256, 2047, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "", "a", "\0", "\n", "é", "🙂", "\u202e", "a" * 129, "{{ 7 * 7 }}", "../../etc/passwd", "<|im_start|>",
    "%s%n", "[" * 99,
)  # fmt: skip
_BYTES = (
    b"", b"\0", b"\xff" * 4, b"\0" * 4, b"\1\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0\2\0\0\0",
    b"\5\0\0\0" * 40,
)  # fmt: skip
_MAX_DEPTH = 4
_MAX_BYTES = 1 << 16
_SIGNED = {
    FieldDescriptor.TYPE_INT32: 32,
    FieldDescriptor.TYPE_SINT32: 32,
    FieldDescriptor.TYPE_SFIXED32: 32,
    FieldDescriptor.TYPE_INT64: 64,
    FieldDescriptor.TYPE_SINT64: 64,
    FieldDescriptor.TYPE_SFIXED64: 64,
}
_UNSIGNED = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_FIXED32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
    FieldDescriptor.TYPE_FIXED64: 64,
}


def golden(message: type[Message]) -> list[bytes]:
    """Valid messages of a type, with every field set."""
    name = message.DESCRIPTOR.full_name
    entries: dict[str, str] = json.loads(GOLDEN.read_text())
    return [bytes.fromhex(value) for key, value in entries.items() if key.partition(" ")[0] == name]


class Mutator:
    """Everything it makes follows from its seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def frames(self, message: type[Message], valid: list[bytes]) -> Iterator[bytes]:
        """Without end: random messages of a type, mutations of valid ones, and noise."""
        rng = self.rng
        while True:
            kind = rng.random()
            if kind < 0.1 or not valid:
                yield rng.randbytes(rng.choice((0, 1, 3, 17, 200)))
            elif kind < 0.4:
                yield self.random_message(message.DESCRIPTOR).SerializeToString()
            elif kind < 0.7:
                yield self.changed_message(message, rng.choice(valid))
            else:
                yield self.changed_bytes(rng.choice(valid), rng.choice(valid))

    def random_message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        """A message of a type with some of its fields set to anything."""
        message = GetMessageClass(descriptor)()
        share = self.rng.random()
        for field in descriptor.fields:
            if self.rng.random() < share and depth < _MAX_DEPTH:
                self._set(message, field, depth)
        return message

    def changed_message(self, message: type[Message], valid: bytes) -> bytes:
        """A valid message with one field, at some depth, set to anything."""
        try:
            root = message.FromString(valid)
        except DecodeError:
            return valid
        node: Message = root
        while True:
            children = [
                value
                for field, value in node.ListFields()
                if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated
            ]
            if not children or self.rng.random() < 0.3:
                break
            node = self.rng.choice(children)
        fields = node.DESCRIPTOR.fields
        if fields:
            self._set(node, self.rng.choice(fields), 0)
        return root.SerializeToString()

    def changed_bytes(self, valid: bytes, other: bytes) -> bytes:
        """Valid bytes after a few accidents."""
        rng = self.rng
        data = bytearray(valid)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(6):
                case 0 if data:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case 1:
                    data[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
                case 2:
                    del data[at : at + rng.choice((1, 4, 30))]
                case 3:
                    del data[at:]
                case 4:
                    data[at:] = other[rng.randrange(len(other) + 1) :]
                case _:
                    data[at:at] = data[at : at + 50] * rng.choice((1, 8))
        return bytes(data[:_MAX_BYTES])

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        rng = self.rng
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys, values = field.message_type.fields
            for _ in range(rng.choice((0, 1, 5))):
                if values.message_type is not None:
                    value[self._scalar(keys)].CopyFrom(self.random_message(values.message_type, depth + 1))
                else:
                    value[self._scalar(keys)] = self._scalar(values)
        elif field.is_repeated:
            for _ in range(rng.choice((0, 1, 2, 20))):
                if field.message_type is not None:
                    value.append(self.random_message(field.message_type, depth + 1))
                else:
                    value.append(self._scalar(field))
        elif field.message_type is not None:
            value.CopyFrom(self.random_message(field.message_type, depth + 1))
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> object:
        rng = self.rng
        if field.type in _SIGNED:
            bits = _SIGNED[field.type]
            value = rng.choice((rng.choice(_INTEGERS), rng.getrandbits(bits))) % (1 << bits)
            return value - (1 << bits) if value >= 1 << (bits - 1) else value
        if field.type in _UNSIGNED:
            bits = _UNSIGNED[field.type]
            return rng.choice((rng.choice(_INTEGERS), rng.getrandbits(bits), rng.randrange(40))) % (1 << bits)
        match field.type:
            case FieldDescriptor.TYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return rng.choice((rng.choice(_FLOATS), rng.uniform(-2, 2)))
            case FieldDescriptor.TYPE_STRING:
                return rng.choice(_TEXTS)
            case FieldDescriptor.TYPE_BYTES:
                return rng.choice((rng.choice(_BYTES), rng.randbytes(4 * rng.randrange(20))))
            case FieldDescriptor.TYPE_ENUM:
                return rng.choice((0, 1, 2, 3, 99, 2**31 - 1))
        raise NotImplementedError(field.full_name)
