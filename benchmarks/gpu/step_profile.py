"""Where a step's time on the device goes: its kernels, by torch's profiler."""

from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity

from baton.checkpoints.shapes import SHAPES
from benchmarks.gpu.driver import Driver, DriverOptions, random_model
from benchmarks.gpu.engine_bench import DecodeSize, decode, start_rows
from benchmarks.gpu.records import Record

_KERNELS = 10
_NAME_LENGTH = 60


def profile_steps(shape: str, device: torch.device, size: DecodeSize, prompt: int) -> Iterator[Record]:
    """A decode step of ``size``, in a graph, and the step of a prompt, which is eager if it is long."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    longest = max(size.longest, prompt)
    driver = Driver(
        random_model(SHAPES[shape], device, dtype), DriverOptions(device, dtype, size.rows, longest, longest)
    )
    driver.capture()
    rows = start_rows(driver, size)
    decode(driver, rows, size.steps)
    yield from _profile(
        device, shape, f"decode, {size.rows} rows", size.steps, lambda: decode(driver, rows, size.steps)
    )
    for row in rows:
        driver.release(row)

    def prefill() -> None:
        row = driver.admit([3 + i % 4000 for i in range(prompt)])
        driver.launch([(row, prompt)]).wait()
        driver.release(row)

    prefill()
    yield from _profile(device, shape, f"a prompt of {prompt}", 1, prefill)


def _profile(device: torch.device, shape: str, step: str, steps: int, work: Callable[[], object]) -> Iterator[Record]:
    """Microseconds and launches per step of the kernels that take most, and of all of them; gaps are not in it."""
    on_device = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profile:
        work()
    times = {
        event.key: ((event.self_device_time_total if on_device else event.self_cpu_time_total) / steps, event.count)
        for event in profile.key_averages()
    }
    ordered = sorted(((name, cost) for name, cost in times.items() if cost[0] > 0), key=lambda item: -item[1][0])
    total = sum(time for _, (time, _) in ordered)  # 0 where the profiler may not look at the device
    for name, (time, count) in [("all", (total, sum(count for _, (_, count) in ordered))), *ordered[:_KERNELS]]:
        figures = {"launches": count / steps, "us": time, "share": time / max(total, 1e-9)}
        yield {"bench": "profile", "shape": shape, "step": step, "kernel": name[:_NAME_LENGTH], **figures}
