"""Features that other tools made -> a feature store."""
