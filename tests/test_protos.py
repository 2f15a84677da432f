"""The protocols: generated code is fresh, encodings do not move, enums begin with UNSPECIFIED.

A changed golden value means that old and new processes would misread each other. New fields and messages add values;
``python -m tests.test_protos`` writes the file anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from baton_protos import admin_pb2, engine_pb2, execution_pb2, generation_pb2, open_inference_pb2

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "protos" / "baton_protos"
GOLDEN = Path(__file__).with_name("golden_messages.json")
OWN_FILES = [module.DESCRIPTOR for module in (generation_pb2, execution_pb2, engine_pb2, admin_pb2)]
FILES = [*OWN_FILES, open_inference_pb2.DESCRIPTOR]
INTEGERS = {
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_SINT32,
    FieldDescriptor.TYPE_FIXED64,
}
FLOATS = {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}


def filled(descriptor: Descriptor, choice: str = "") -> Message:
    """A message with every field set to a value made from its number and name.

    Of each oneof it has ``choice`` if that is a member, else the first member.
    """
    message: Message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        members = [one.name for one in field.containing_oneof.fields] if field.containing_oneof else [field.name]
        if field.name == (choice if choice in members else members[0]):
            _set(message, field)
    return message


def _set(message: Message, field: FieldDescriptor) -> None:
    values = [_value(field, 0), _value(field, 1)]
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        entries = getattr(message, field.name)
        if value.message_type:
            entries[_value(key, 0)].CopyFrom(_value(value, 0))
        else:
            entries[_value(key, 0)] = _value(value, 0)
    elif field.is_repeated and field.message_type:
        getattr(message, field.name).extend(values)
    elif field.is_repeated:
        getattr(message, field.name)[:] = values
    elif field.message_type:
        getattr(message, field.name).CopyFrom(values[0])
    else:
        setattr(message, field.name, values[0])


def _value(field: FieldDescriptor, index: int) -> object:
    if field.message_type:
        return filled(field.message_type)
    if field.enum_type:
        return field.enum_type.values[-1].number
    if field.type in INTEGERS:
        return 1000 * field.number + index + 1
    if field.type in FLOATS:
        return field.number + index + 0.5
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    text = f"{field.name} {index}"
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text


def variants() -> Iterator[tuple[str, Message]]:
    """Every message of the files, and one variant for each further member of a oneof."""
    for file in FILES:
        for descriptor in file.message_types_by_name.values():
            yield descriptor.full_name, filled(descriptor)
            for oneof in descriptor.oneofs:
                for field in oneof.fields[1:]:
                    yield f"{descriptor.full_name} with {field.name}", filled(descriptor, field.name)


def encodings() -> dict[str, str]:
    return {name: message.SerializeToString(deterministic=True).hex() for name, message in variants()}


def test_encodings_do_not_move() -> None:
    assert encodings() == json.loads(GOLDEN.read_text())


def test_golden_messages_are_full() -> None:
    for name, message in variants():
        again = type(message).FromString(message.SerializeToString())
        assert again == message
        alone = [
            field for field in message.DESCRIPTOR.fields if len(getattr(field.containing_oneof, "fields", [1])) == 1
        ]
        missing = {field.name for field in alone} - {field.name for field, _ in message.ListFields()}
        assert not missing, name


@pytest.mark.parametrize("file", OWN_FILES, ids=lambda file: Path(file.name).stem)
def test_enums_begin_with_unspecified(file: FileDescriptor) -> None:
    for enum in file.enum_types_by_name.values():
        zero = enum.values_by_number[0].name
        prefix = "".join(f"_{letter}" if letter.isupper() else letter for letter in enum.name).strip("_").upper()
        assert zero == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


def test_generated_code_is_what_make_protos_makes(tmp_path: Path) -> None:
    # -o: the environment that runs this test need not be set up again.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    binaries = Path(sys.executable).parent
    command = ["make", "--silent", "-o", f"{binaries.parent}/.installed", "protos"]
    variables = [f"VENV={binaries.parent}", f"PROTOS_OUT={tmp_path}"]
    subprocess.run([*command, *variables], cwd=ROOT, env=environment, check=True, timeout=60)
    made = {path.name: path.read_text() for path in (tmp_path / "baton_protos").iterdir()}
    committed = {path.name: path.read_text() for path in GENERATED.iterdir() if "_pb2" in path.name and path.is_file()}
    assert sorted(made) == sorted(committed)
    assert made == committed


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(encodings(), indent=1) + "\n")
