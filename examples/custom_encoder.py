"""An encoder of one's own, aligned by the embedded recipe with one override (run it in this folder):
gmail-lightning fit --config ../recipes/emoji/align.yaml --model.encoder.encoder custom_encoder.BagOfBytesCLIP
"""

import torch
from open_clip.transformer import Transformer
from torch import Tensor, nn

from gmail_lightning.models import DualEncoder
from gmail_lightning.models.branches.lora import block_targets
from gmail_lightning.types import ImageSpec, TextSpec


def encode_bytes(texts: list[str]) -> Tensor:
    return torch.tensor([[*text.encode()[:24].ljust(24)] for text in texts])


class BagOfBytesCLIP(DualEncoder):
    pretrained = True  # evaluation refuses an encoder of random weights; these stand for yours
    image_spec = ImageSpec(size=(64, 64))
    text_spec = TextSpec(encode_bytes, context_length=24)
    embed_dim = 64
    logit_scale = torch.tensor(10.0)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same "pretrained" weights every time
            self.patches = nn.Conv2d(3, 64, kernel_size=16, stride=16)
            self.blocks = Transformer(width=64, layers=2, heads=2)
            self.bytes = nn.EmbeddingBag(256, 64)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).mT).mean(dim=1)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.bytes(text)

    def lora_targets(self, roles, tower="image"):
        return block_targets(self.blocks.resblocks if tower == "image" else [], roles)
