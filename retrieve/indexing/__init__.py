"""The steps of `svb index`; see `svb.retrieve.index`."""
