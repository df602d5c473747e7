"""`PairingGain`."""

from .pairing_gain import PairingGain

__all__ = ["PairingGain"]
