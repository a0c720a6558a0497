"""Section 3.2's search, projection and pruning of prototypes."""
