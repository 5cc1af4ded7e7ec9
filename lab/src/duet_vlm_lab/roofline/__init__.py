"""Seconds on paper: devices by their data sheets, and how long a request would take on them."""
