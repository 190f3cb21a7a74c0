"""The version of the distribution, and nothing else, so that the build reads it without importing torch."""

__version__ = "0.1.0"
