"""Pictures and evidence: why a point got its label."""
