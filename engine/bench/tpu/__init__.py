"""Compiling for TPUs with no TPU at hand, and reading what came out."""
