"""N environments behind one interface (VecEnv): Gymnasium vector environments, worker pools, tensor tasks."""
