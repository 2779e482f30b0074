"""Several processes and machines that fill one store."""
