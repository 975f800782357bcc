"""Evaluation of a saved or live policy: episodes, periodic evaluation, video, export."""
