"""What was trained, as models that other libraries load without this one."""

from gmail_lightning.export.checkpoint import export_checkpoint

__all__ = ["export_checkpoint"]
