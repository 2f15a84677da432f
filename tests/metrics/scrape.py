"""Reading a Prometheus endpoint."""

import urllib.request
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Samples:
    """What one scrape said."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of every series of ``name``."""
        return [dict(sample.labels) for sample in self._samples if sample.name == name]

    def value(self, name: str, **labels: str) -> float:
        """The value of the only series of ``name`` with these labels among its own."""
        (value,) = self._values(name, labels)
        return value

    def sum(self, name: str, **labels: str) -> float:
        """The sum over all series of ``name`` with these labels among their own."""
        return sum(self._values(name, labels))

    def _values(self, name: str, labels: dict[str, str]) -> Iterable[float]:
        return [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]


def scrape(port: int) -> Samples:
    """What the endpoint on ``port`` says now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return Samples(response.read().decode())


def collected(collector: Collector) -> Samples:
    """What an endpoint with this collector would say."""
    registry = CollectorRegistry()
    registry.register(collector)
    return Samples(generate_latest(registry).decode())
