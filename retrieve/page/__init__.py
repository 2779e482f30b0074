"""The page that shows answers: one hand-written template, served by `svb serve` and written by `--html`."""
