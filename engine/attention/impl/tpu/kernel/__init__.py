"""What Pallas compiles, and nothing else: under 900 lines; ``contract`` is what it shares with the code around it."""
