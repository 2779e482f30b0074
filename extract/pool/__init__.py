"""Worker processes that decode."""
