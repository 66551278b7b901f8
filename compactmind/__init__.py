"""CompactMind: make a transformer small and fast, and measure what that cost."""

__version__ = "0.1.0"
