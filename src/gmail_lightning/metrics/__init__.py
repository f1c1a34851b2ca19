"""Metrics: functions first, thin ``torchmetrics`` classes around them."""

from gmail_lightning.metrics.caption_statistics import CaptionStatistics
from gmail_lightning.metrics.captioning.coco_score import CocoCaptionScore
from gmail_lightning.metrics.clip_score import CLIPScore, RefCLIPScore, clip_score, ref_clip_score
from gmail_lightning.metrics.feature_spread import FeatureSpread, feature_spread
from gmail_lightning.metrics.generation import GenerationScore, cmmd, kernel_distance
from gmail_lightning.metrics.modality_gap import ModalityGap, linear_probe_accuracy, modality_gap
from gmail_lightning.metrics.multiple_choice import MultipleChoice, chosen_letter
from gmail_lightning.metrics.repair import Repair, repair_pairs
from gmail_lightning.metrics.retrieval import ImageTextRecall, deduplicated_recall, image_text_recall
from gmail_lightning.metrics.truncation import TruncatedTexts
from gmail_lightning.metrics.zero_shot import ZeroShotAccuracy

__all__ = [
    "CLIPScore",
    "CaptionStatistics",
    "CocoCaptionScore",
    "FeatureSpread",
    "GenerationScore",
    "ImageTextRecall",
    "ModalityGap",
    "MultipleChoice",
    "RefCLIPScore",
    "Repair",
    "TruncatedTexts",
    "ZeroShotAccuracy",
    "chosen_letter",
    "clip_score",
    "cmmd",
    "deduplicated_recall",
    "feature_spread",
    "image_text_recall",
    "kernel_distance",
    "linear_probe_accuracy",
    "modality_gap",
    "ref_clip_score",
    "repair_pairs",
]
