"""Features of the frozen backbone: extracted, cached, stored, searched."""
