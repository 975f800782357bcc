"""Destinations of a run's statistics, all behind the `Sink` protocol."""
