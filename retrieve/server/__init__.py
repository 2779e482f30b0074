"""The server behind `svb serve`: a page and an HTTP API of an index that is kept open."""
