"""tune: find the runtime setting with the least energy per token."""

__version__ = "0.1.0"
