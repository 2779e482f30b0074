"""svb: find videos by text with frozen features and support-set bottlenecks.

The stages, in the order the data flows: `svb.extract.run.extract`, `svb.extract.captions.captions`,
`svb.train.run.train`, `svb.retrieve.evaluate.evaluate`, `svb.retrieve.index.index`,
`svb.retrieve.search.open_searcher`. Importing `svb` itself loads nothing heavy.
"""

__version__ = "0.1.0"
