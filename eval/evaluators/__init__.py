"""Measures on frozen features: k-NN, linear and logistic probes, clustering, retrieval."""
