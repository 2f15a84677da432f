"""The scheduling core: pure, synchronous, deterministic. No clock, no sockets, no threads."""
