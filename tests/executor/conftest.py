"""Threads of these tests' matrix products sleep while they wait: they share the machine with other tests' processes.

libgomp reads this when torch is loaded. Spinning, its default, makes a step 10 to 40 times slower on busy cores.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
