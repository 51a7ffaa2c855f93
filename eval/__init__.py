"""Weights in, numbers and pictures out (installed as ssl_xcit.eval)."""
