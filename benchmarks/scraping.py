"""Reading Prometheus endpoints."""

import urllib.request
from collections.abc import Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

_PATIENCE = 10.0  # seconds


class Metrics:
    """What an endpoint of this machine says now."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_PATIENCE) as response:
            families = text_string_to_metric_families(response.read().decode())
            self._families: Mapping[str, Metric] = {family.name: family for family in families}

    def total(self, name: str) -> float:
        """A counter, over all its series."""
        return sum(one.value for one in self._families[name].samples if not one.name.endswith("_created"))

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """A counter's series by the value of a label."""
        samples = self._families[name].samples
        return {one.labels[label]: one.value for one in samples if not one.name.endswith("_created")}

    def histogram(self, name: str) -> dict[float, float]:
        """How many observations were at most so large, by each bucket's bound, in ascending order."""
        counts: dict[float, float] = {}
        for one in self._families[name].samples if name in self._families else ():
            if "le" in one.labels:
                bound = float(one.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + one.value
        return dict(sorted(counts.items()))
