"""The simulated disk: owns the order of every event, keeps or drops unflushed blocks at a crash, and knows what the contract allows.

For tests only: it may import anything up to the engine and the volume's recovery, and nothing imports it.
"""
