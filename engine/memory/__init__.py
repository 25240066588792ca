"""The control plane: which page belongs to whom. NumPy and Python only; never imports jax."""
