"""A saved or live policy played without learning: episodes, periodic evaluation, video, export."""
