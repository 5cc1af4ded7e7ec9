"""A page to play with: drop a picture or a clip, ask, and see what is spent, what is kept and why. Only ``page`` needs
Gradio."""
