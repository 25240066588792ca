"""Where the oracle is, and threads enough for the interpreter."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "attention"))
# Each warpgroup that waits blocks a thread of jax's pool; of few cores it would block all.
os.environ.setdefault("NPROC", "16")  # read once, when jax starts its CPU client
