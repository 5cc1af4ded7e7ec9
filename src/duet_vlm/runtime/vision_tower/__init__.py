"""In front of the vision tower's blocks, and inside them: fewer patches go through.

``duet_vlm.reducers.vision_tower`` decides, this acts.
"""
