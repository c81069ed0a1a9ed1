"""Networks of other people: any `nn.Module` that a Python function returns."""
