"""What the processes of a cluster are made of."""

from pathlib import Path

from baton import LocalCluster
from tests.e2e.harness import descendants


def test_no_scheduler_process_has_loaded_torch(cluster: LocalCluster) -> None:
    scheduler = descendants(cluster.scheduler_pid)
    assert len(scheduler) >= 3, "a launcher, an engine and an api process"
    for pid in scheduler:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    for pid in cluster.executor_pids().values():
        assert "libtorch" in Path(f"/proc/{pid}/maps").read_text()  # so the check can fail
