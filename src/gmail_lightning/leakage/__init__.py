"""What training shares with the evaluation sets, so that their figures would be too good."""

from gmail_lightning.leakage.check import KINDS, AllowedOverlap, Kind, Overlap, check_leakage

__all__ = ["KINDS", "AllowedOverlap", "Kind", "Overlap", "check_leakage"]
