"""The techniques: one folder per kind, one file per technique."""
