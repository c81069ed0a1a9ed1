"""Training: each family's readable file, one loop, and the checkpoint folder that `export` reads."""
