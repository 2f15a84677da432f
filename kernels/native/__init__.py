"""C++ kernels for CPUs: built by ``build``, loaded by ``library``, called by each operation's ``native`` module."""
