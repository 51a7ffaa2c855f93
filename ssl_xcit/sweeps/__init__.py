"""Values in, run folders out: many runs of one command, and which of them was the best."""
