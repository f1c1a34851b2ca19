"""Lightning modules, one per job."""

from gmail_lightning.tasks.alignment import AlignmentTask
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.tasks.captioning import CaptioningTask
from gmail_lightning.tasks.classification import ZeroShotClassificationTask
from gmail_lightning.tasks.embedding import EmbeddingTask
from gmail_lightning.tasks.encoder_task import EncoderTask
from gmail_lightning.tasks.image_generation import ImageGenerationTask
from gmail_lightning.tasks.linear_probe import LinearProbeTask
from gmail_lightning.tasks.long_retrieval import LongRetrievalTask
from gmail_lightning.tasks.results import EvaluationResult
from gmail_lightning.tasks.retrieval import RetrievalTask
from gmail_lightning.tasks.text_to_image import TextToImageTask
from gmail_lightning.tasks.unidiff.synthesis_score import SynthesisScore
from gmail_lightning.tasks.unidiff.task import UniDiffTask

__all__ = [
    "AlignmentTask",
    "BaseTask",
    "CaptioningTask",
    "EmbeddingTask",
    "EncoderTask",
    "EvaluationResult",
    "ImageGenerationTask",
    "LinearProbeTask",
    "LongRetrievalTask",
    "RetrievalTask",
    "SynthesisScore",
    "TextToImageTask",
    "UniDiffTask",
    "ZeroShotClassificationTask",
]
