"""Small helpers of every package."""
