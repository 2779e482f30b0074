"""What is at rest: feature stores, caption tables and their features."""
