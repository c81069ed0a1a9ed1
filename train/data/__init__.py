"""Data sets: one file each that knows the canonical files, their sha256 and how to read them."""
