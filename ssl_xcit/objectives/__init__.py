"""Embeddings in, loss out."""
