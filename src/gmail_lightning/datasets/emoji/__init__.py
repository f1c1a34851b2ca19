"""The data set that ships with the package; see ``NOTICE.md`` for the authors of the drawings and their licences."""

from gmail_lightning.datasets.emoji.dataset import CLASS_TEMPLATES, HANDS, TEMPLATES, EmojiDataset

__all__ = ["CLASS_TEMPLATES", "HANDS", "TEMPLATES", "EmojiDataset"]
