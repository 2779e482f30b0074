"""Frames -> batches -> frozen backbones -> rows."""
