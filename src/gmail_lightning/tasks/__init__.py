"""Lightning modules, one per job."""

from gmail_lightning.tasks.alignment import AlignmentTask
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.tasks.image_generation import ImageGenerationTask
from gmail_lightning.tasks.retrieval import RetrievalTask
from gmail_lightning.tasks.text_to_image import TextToImageTask

__all__ = ["AlignmentTask", "BaseTask", "ImageGenerationTask", "RetrievalTask", "TextToImageTask"]
