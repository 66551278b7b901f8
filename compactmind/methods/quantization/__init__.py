"""Store and compute weights in fewer bits."""
