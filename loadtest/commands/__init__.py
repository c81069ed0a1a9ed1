"""What `python -m loadtest` does: a module each, with `main(arguments) -> exit status`."""
