"""Approximate indexes: HNSW, IVF-PQ and pgvector, and their measured recall."""
