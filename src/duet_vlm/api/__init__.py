"""What users call: attach a method to a model, load, save, calibrate, stream."""
