"""Records as a person wants to see them: what was checked, and figures in columns."""

from collections.abc import Iterator, Sequence

from benchmarks.gpu.records import Record

_HIDDEN = ("stage", "check", "passed", "bench")


def tables(records: Sequence[Record], stages: Sequence[str]) -> Iterator[str]:
    """Lines, stage by stage in the order of ``stages``. Passed checks of one name share a line, failed ones do not."""
    for stage in stages:
        found = [record for record in records if record.get("stage") == stage]
        if found:
            yield stage
            yield from _checks([record for record in found if "check" in record])
            yield from _figures([record for record in found if "bench" in record])


def _checks(records: Sequence[Record]) -> Iterator[str]:
    passed = [record for record in records if record["passed"]]
    for name in dict.fromkeys(record["check"] for record in passed):
        same = [record for record in passed if record["check"] == name]
        yield f"  ok      {name} ({len(same)}): {_merged(same)}"
    for record in records:
        if not record["passed"]:
            yield f"  FAILED  {record['check']}: {_merged([record])}"


def _merged(records: Sequence[Record]) -> str:
    """Details of all: the largest number, every word."""
    parts = []
    for name in _columns(records):
        values = list(dict.fromkeys(_text(record[name]) for record in records if name in record))
        numbers = [value for record in records if isinstance(value := record.get(name), int | float)]
        if len(values) > 1 and len(numbers) == len(records):
            parts.append(f"{name} up to {_text(max(numbers))}")
        else:
            parts.append(f"{name} {' '.join(values)}")
    return ", ".join(parts)


def _figures(records: Sequence[Record]) -> Iterator[str]:
    for bench in dict.fromkeys(record["bench"] for record in records):
        same = [record for record in records if record["bench"] == bench]
        columns = _columns(same)
        rows = [columns, *([_text(record.get(column, "")) for column in columns] for record in same)]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        yield f"  {bench}"
        for row in rows:
            yield "    " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _columns(records: Sequence[Record]) -> list[str]:
    """What any of them has, but for what none of them knows."""
    names = dict.fromkeys(name for record in records for name in record if name not in _HIDDEN)
    return [name for name in names if any(record.get(name) is not None for record in records)]


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
