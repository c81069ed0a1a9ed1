"""Protocol messages and stubs, generated from `proto/` by `make proto`; not edited by hand."""
