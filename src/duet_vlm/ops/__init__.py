"""Pure batched tensor functions: no model, no state. Each has a slow twin in the tests."""
