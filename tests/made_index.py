"""Names of indexes.py that tests of searching use."""

from indexes import MODEL, embed_text, naive_scores, text_vector, write_index

__all__ = ["MODEL", "embed_text", "naive_scores", "text_vector", "write_index"]
