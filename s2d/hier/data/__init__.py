"""What the hierarchical model is trained and judged on: posed captures, and which of their views belong together.

A *capture* is one recording of one place: N posed photos. Three sources have them: RealEstate10K-style chunks (`chunks`), any posed scene
(`posed`: COLMAP, transforms.json), and what the converters make of DTU and Replica (`convert`). A *pick* is what a sample is made of: the
rows of its context views, which the model sees, and of its target views, which it must render.
"""
