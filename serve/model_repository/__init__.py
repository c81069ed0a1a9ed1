"""Models and versions on disk and in memory: load, reload, unload, poll."""
