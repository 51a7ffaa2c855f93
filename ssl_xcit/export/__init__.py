"""Weights in, files of other tools out, each compared with the backbone before it gets its name."""
