"""The run folder: its files, lock, checkpoints, restore and NaN dumps."""
