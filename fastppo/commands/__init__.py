"""The commands of `fastppo`: flags, and what each does; nothing heavy is imported before one is run."""
