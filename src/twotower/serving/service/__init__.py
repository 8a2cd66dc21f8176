"""The parts of the service: limits, batching, models that are swapped while they answer, metrics, logs, routes."""
