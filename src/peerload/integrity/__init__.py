"""The proof of the bytes: digests, claims, and their comparison."""
