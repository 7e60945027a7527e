"""What holds for all tests."""

import os

# Workers of pytest share the cores: torch with as many threads in each waits for itself, at four times the CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
