"""Native CPU kernels behind XLA's foreign function interface, for what XLA's own CPU compiler gets wrong."""
