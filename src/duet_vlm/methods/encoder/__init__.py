"""Methods between the vision tower and the decoder."""
