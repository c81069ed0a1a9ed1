"""The RPCs' handlers, by group: (core, parsed request) → response message; `serve.servicer` has the table."""
