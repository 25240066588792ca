"""The implementations of attention; ``implementation`` says what each of them is."""
