"""Pictures, videos and text as they come in."""
