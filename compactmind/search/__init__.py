"""Searching over pipelines: what is legal, how one is run and measured."""
