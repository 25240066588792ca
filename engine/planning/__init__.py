"""Sizing: bytes to pages and back."""
