"""Emulators on the sphere: harmonics, networks and climatology."""
