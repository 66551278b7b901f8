"""Teach a small model what a large one knows."""
