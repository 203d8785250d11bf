"""Fuse trained experts through their energies: `E = Σ λ_i E_i`."""

__version__ = "0.1.0.dev0"
