"""What a model's training really did: audits and comparisons."""
