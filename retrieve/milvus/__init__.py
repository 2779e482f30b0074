"""An index whose vectors lie in Milvus."""
