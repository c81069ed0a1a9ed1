"""The RPCs' handlers, by group: (core, parsed request) → response message; `servicer` has the table."""
