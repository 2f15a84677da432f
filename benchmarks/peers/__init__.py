"""Other systems. Drivers are run by path in the peer's own environment, so they import the standard library only."""
