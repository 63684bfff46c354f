"""Weather emulator on the sphere: spherical harmonics, networks, emulator and climatology."""
