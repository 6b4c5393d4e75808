"""Folding: arrays, data flow, plan, models; `bnjax.fold` is the public face."""
