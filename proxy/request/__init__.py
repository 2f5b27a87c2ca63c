"""The life of one request: `handler.py` alone knows the order of the steps."""
