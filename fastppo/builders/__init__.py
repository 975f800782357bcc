"""Build a trainer's parts from settings: resolve the config, build, compile."""
