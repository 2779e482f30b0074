"""Videos and texts -> embeddings."""
