"""The Llama that proves the memory in use, its checkpoints and its text."""
