"""How a model is stored and read, and what multiplies it: a file per format, and the table of all (table.py)."""
