"""Which waiting requests run next. Pure, the clock is passed in; `executor` has the threads."""
