"""How code runs: devices, threads, processes, compilation, signals, files. Nothing here knows of PPO."""
