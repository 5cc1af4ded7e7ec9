"""The user interface: attach a method to a model, load, save, calibrate, stream."""
