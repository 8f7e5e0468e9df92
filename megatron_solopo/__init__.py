"""SoLoPO (short-to-long preference optimization) on Megatron Core.

Importing this package imports nothing heavy; take what you need from its modules.
"""

__version__ = "0.1.0"
