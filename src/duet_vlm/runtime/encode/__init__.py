"""From the vision tower to the rows that enter the decoder."""
