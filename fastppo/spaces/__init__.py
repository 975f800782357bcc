"""Gymnasium spaces as plain data: what environments and policies, which don't know each other, both need."""
