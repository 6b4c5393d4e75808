"""The parts of `bnjax.nnx`."""
