"""The files of an index: how they are written and read."""
