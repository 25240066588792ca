"""The prefix cache: pages of past sequences, found by their tokens."""
