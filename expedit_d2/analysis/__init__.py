"""Measurements: FLOPs, time, and what they are compared with."""
