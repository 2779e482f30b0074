"""Searches an index: from a query to scores, moments and confidence. `searcher.py` is the main path."""
