"""Conversions, a file for each framework; `bnjax.interop` is their public face."""
