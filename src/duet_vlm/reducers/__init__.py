"""The contracts that methods meet, and what they receive."""
