"""Remove whole structures, for real."""
