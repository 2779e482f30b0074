"""What `svb index` does to bring an index to where its store is; see `svb.retrieve.index`."""
