"""One yaml a choice, read by Hydra (installed as ssl_xcit.conf)."""
