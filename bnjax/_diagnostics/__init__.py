"""The parts of `bnjax.diagnostics`."""
