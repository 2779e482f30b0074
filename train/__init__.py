"""Heads, losses, the support set and the loop that trains them on cached features."""
