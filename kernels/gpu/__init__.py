"""Triton kernels: where they run is ``library``'s matter; each operation's own are in its ``gpu`` module."""
