"""A branch of one's own, not LoRA, aligned by the embedded recipe with one override (run it in this folder):
gmail-lightning fit --config ../recipes/emoji/align.yaml --model.encoder.branch custom_branch.Bottleneck

Generated images pass the frozen tower and a small residual map behind it (as in CLIP-Adapter, arXiv 2110.04544); real
images pass the tower alone. In Python, import this file first, for a checkpoint names the class and may not import it:
    encoder = ModalityEncoder.from_checkpoint(".../checkpoints/last.ckpt")
"""

from torch import Tensor, nn
from torch.nn import functional as F

from gmail_lightning.models import Branch, ImageEncoder


class Bottleneck(Branch):
    """Adds ``up(gelu(down(features)))`` to features (B, D), by way of ``width`` numbers; at first it adds nothing."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width

    def attach(self, encoder: ImageEncoder) -> None:
        super().attach(encoder)
        self.down = nn.Linear(encoder.embed_dim, self.width)
        self.up = nn.Linear(self.width, encoder.embed_dim)
        nn.init.zeros_(self.up.weight)  # generated images are seen as by the plain tower to begin with
        nn.init.zeros_(self.up.bias)

    def encode_image(self, image: Tensor) -> Tensor:
        features = self.tower.encode_image(image)
        return features + self.up(F.gelu(self.down(features)))

    @property
    def settings(self) -> dict[str, int]:
        return {"width": self.width}
