"""Files, locks, hardware, terminal output and tables, for every room."""
