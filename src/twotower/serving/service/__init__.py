"""The parts of the HTTP service: limits, batching, model reloading, metrics, logs and routes."""
