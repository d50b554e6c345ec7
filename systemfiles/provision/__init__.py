"""How a missing or damaged artifact comes to be, and why an intact one is kept.

For each artifact, under its lock: **kept** when it is on disk, intact, and of today's inputs; else **recovered** from
the content store when that still holds all of it; else **made** by its recipe from its origin.
"""
