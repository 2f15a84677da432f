"""The engine process: clock and sockets around the core."""
