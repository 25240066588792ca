"""Compiles for TPUs without a TPU, and reads the compiled programs."""
