"""`svb serve`: an index kept open, behind HTTP."""
