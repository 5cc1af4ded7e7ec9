"""A page to play with: drop an image or a video, ask, and see costs, kept tokens and scores. Only ``page`` needs
Gradio."""
