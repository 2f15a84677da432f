"""Pictures of runs that have little to show."""

from pathlib import Path

import pytest

from baton.bench.plot import plot_run, plot_sweep
from baton.bench.records import ClosedLoop, Record, RunResult
from baton.bench.slo import Slo
from baton.bench.summary import summarize

PNG = b"\x89PNG\r\n\x1a\n"
LOAD = ClosedLoop(2)
FAILED = Record(due=0.1, sent=0.1, arrivals=(), ended=0.1, status="UNAVAILABLE", error="gone", usage=None)
ONE_TOKEN = Record(due=0.1, sent=0.1, arrivals=((0.2, 1),), ended=0.2, status="OK", error="", usage=None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("records", [(), (FAILED,), (ONE_TOKEN,), (FAILED, ONE_TOKEN)])
def test_runs_with_little_in_them(records: tuple[Record, ...], tmp_path: Path) -> None:
    result = RunResult(LOAD, records, max((record.ended for record in records), default=0.0))
    plot_run(tmp_path / "run.png", "nothing much", result, Slo())
    plot_sweep(tmp_path / "sweep.png", "nothing much", [summarize(result, Slo(ttft=1.0))], Slo(ttft=1.0))
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG)
