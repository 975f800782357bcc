"""What a run reports: statistics, health rules, update samples, the run logger and its sinks."""
