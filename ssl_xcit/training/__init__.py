"""Loss in, weights out."""
