"""Methods between decoder layers."""
