"""What a run will cost: parameters, FLOPs, hardware peaks, memory, checkpoints. No torch; the one home of these definitions.

Each part is imported from its module: a desk command starts with what it needs, and no more.
"""
