"""Measurements: FLOPs, time, memory and kernel launches."""
