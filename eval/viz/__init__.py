"""What a backbone has learned, as pictures and pages that people look at."""
