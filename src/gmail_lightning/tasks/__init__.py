"""Lightning modules, one per job."""

from gmail_lightning.tasks.alignment import AlignmentTask
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.tasks.retrieval import RetrievalTask

__all__ = ["AlignmentTask", "BaseTask", "RetrievalTask"]
