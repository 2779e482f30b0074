"""How well a run retrieves: ranks, paired comparisons, and grids of runs; see `svb.retrieve.evaluate`."""
