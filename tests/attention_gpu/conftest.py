"""The interpreter blocks a thread of jax's pool for each warpgroup that waits; with few cores they would be all."""

import os

os.environ.setdefault("NPROC", "16")  # read once, when jax starts its CPU client
