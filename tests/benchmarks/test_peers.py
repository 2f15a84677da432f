"""A peer that fails in whatever way is reported and ends; one that works is asked for what was meant."""

from pathlib import Path

import pytest

from benchmarks import sides
from benchmarks.sides import PeerSide, Setting, SideFailedError
from benchmarks.workloads import Request

_REQUESTS = [Request([5, 6, 7], 4), Request([8], 2)]
_DRIVER = """
import sys, time
sys.path.insert(0, {folder!r})
from protocol import serve

class Driver:
    def info(self):
        print("noise")
        return {{"name": "fake 1.0"}}

    def run(self, requests):
        {run}

serve(Driver)
"""


def _side(monkeypatch: pytest.MonkeyPatch, folder: Path, run: str, time_limit: float = 30.0) -> PeerSide:
    script = folder / "driver.py"
    script.write_text(_DRIVER.format(folder=str(Path(sides.__file__).parent / "peers"), run=run))
    monkeypatch.setattr(sides, "DRIVERS", {"transformers-fake": (str(script),)})
    monkeypatch.setattr(sides, "_kv_tokens", lambda checkpoint, kv_gib: 1)
    setting = Setting(
        shape="",
        checkpoint=folder,
        threads=1,
        kv_gib=1,
        max_batched_tokens=1,
        time_limit=time_limit,
        start_limit=30.0,
        peers=folder,
        pythons={},
    )
    return PeerSide("transformers-fake", setting)


def test_a_driver_gets_the_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    side = _side(monkeypatch, tmp_path, "assert requests[0][0] == [5, 6, 7]; return [n for _, n in requests]")
    assert side.start()["name"] == "fake 1.0"
    for _ in range(2):
        assert side.run(_REQUESTS) >= 0
    side.close()


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("return [4, 3]", "instead of those asked for"),
        ("raise ValueError('no memory')", "ValueError: no memory"),
        ("sys.exit(3)", "exit code"),
        ("time.sleep(60)", "within 0.5 s"),
    ],
)
def test_failures_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: str, reason: str) -> None:
    side = _side(monkeypatch, tmp_path, run, time_limit=0.5 if "sleep" in run else 30.0)
    side.start()
    with pytest.raises(SideFailedError, match=reason):
        side.run(_REQUESTS)
    side.close()
