"""The calls of users: attach a method to a model, load, save, calibrate, stream."""
