"""Train a model again after something was taken out of it."""
