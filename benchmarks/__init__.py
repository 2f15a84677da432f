"""Benchmarks, one module each; see docs/benchmarks.md."""

import os

# As in executors: a thread of OpenMP that spins after torch's work takes a core from what is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
