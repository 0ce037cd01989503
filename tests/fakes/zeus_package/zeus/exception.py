"""Base of all errors."""


class ZeusBaseError(Exception):
    """As in zeus."""
