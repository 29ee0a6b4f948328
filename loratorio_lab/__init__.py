"""The laboratory: what trains and checks the toybox, measures the methods, and makes tables of the documentation.

It imports `loratorio`; nothing of `loratorio` imports it, and no WebUI loads it.
"""
