"""The parts of ``benchmarks.gpu_check``. Nothing here imports triton when it is imported."""
