"""Patches that put this library's modules in the place of other projects' own."""
