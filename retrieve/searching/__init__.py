"""How an index is asked: from a query to scores, moments and confidence; see `svb.retrieve.search`."""
