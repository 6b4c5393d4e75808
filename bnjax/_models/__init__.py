"""Models of each kind, whose layers are observed and given other statistics."""
