"""How code runs, never what it computes."""
