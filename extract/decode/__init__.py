"""A video file -> its chosen frames and their times."""
