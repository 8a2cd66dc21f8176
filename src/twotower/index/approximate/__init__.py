"""Approximate indexes: HNSW, IVF-PQ, 8-bit and 1-bit codes, and pgvector, and their measured recall."""
