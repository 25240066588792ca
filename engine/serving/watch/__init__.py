"""What an engine does, counted and exported."""
