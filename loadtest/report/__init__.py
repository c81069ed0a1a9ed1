"""A result for a reader: in the terminal, as CSV, as a page of HTML."""
