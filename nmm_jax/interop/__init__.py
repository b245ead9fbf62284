"""Weights of other libraries in our runs, and ours in their layouts (docs/interop.md)."""
