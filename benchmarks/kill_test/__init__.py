"""Real processes, killed, frozen, drained and cut off while they serve; streams must be what they are without that."""
