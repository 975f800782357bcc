"""Reporting of a run: statistics, health rules, update samples, the run logger and its sinks."""
