"""Methods whose rows a trained module makes."""
