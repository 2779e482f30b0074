"""Embeddings, metrics, evaluation, the index and search."""
