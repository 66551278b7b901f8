"""What a model gets right and what it costs."""
