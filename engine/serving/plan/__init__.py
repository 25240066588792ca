"""Which requests run in a step; never imports jax."""
