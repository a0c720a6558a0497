"""The package's version, which every run's manifest keeps."""

__version__ = "0.1.0"
