"""Calibration data, and the statistics taken from it."""
