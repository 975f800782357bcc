"""From settings to the parts of a trainer: resolve the config, build the parts, compile them."""
