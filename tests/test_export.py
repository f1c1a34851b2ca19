import gzip
from pathlib import Path

import open_clip
import pytest
import torch
from tiny_encoders import routed
from torchvision.transforms import Normalize

from gmail_lightning.export import export_checkpoint
from gmail_lightning.models import HFCLIPEncoder, LoRA, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.branches.adapters import adapter_keys
from gmail_lightning.models.branches.fingerprint import fingerprint

TEXT = {"context_length": 16, "vocab_size": 512 + 8 + 2, "width": 32, "heads": 2, "layers": 1}
NATIVE = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
TIMM = {"image_size": 160, "timm_model_name": "test_vit"}
CONFIGS = {
    "native": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": NATIVE, "text_cfg": TEXT},
    "timm": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": TIMM | {"timm_pool": "token", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "timm_without_matrix": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": TIMM | {"timm_pool": "avg", "timm_proj": "none"},
        "text_cfg": TEXT,
    },
}


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    lines = ["#version", "i n", "t h", "a n", "r e", "a r", "e r", "th e</w>", "in g</w>"]
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def write(path: Path, model: ModalityEncoder | OpenCLIPEncoder, encoder: OpenCLIPEncoder, **settings) -> Path:
    """What a task of the command line writes."""
    adapted = isinstance(model, ModalityEncoder)
    init = {"config": encoder.model_config, "merges": str(encoder.merges)}
    content = {
        "state_dict": {
            f"encoder.{k}": v for k, v in model.state_dict().items() if k in adapter_keys(model) or not adapted
        },
        "hyper_parameters": {"encoder": {"class_path": "OpenCLIPEncoder", "init_args": init}, **settings},
    }
    if adapted:
        content["base_fingerprint"] = fingerprint(model)
    torch.save(content, path)
    return path


def base(kind: str, merges: Path) -> OpenCLIPEncoder:
    torch.manual_seed(0)
    return OpenCLIPEncoder(config=CONFIGS[kind], merges=str(merges))


@pytest.mark.slow
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["native", "timm"])
def test_plain_open_clip_gives_the_generated_branch(merges, tmp_path, kind: str, projection: bool) -> None:
    encoder = base(kind, merges)
    settings = {"rank": 3, "alpha": 6.0, "targets": ["q", "v", "out", "fc1", "fc2"], "projection": projection}
    model = routed(encoder, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    path = write(tmp_path / "a.ckpt", model, encoder, **settings)
    # The weights behind the checkpoint are those of seed 0, so the same base is passed by hand.
    export_checkpoint(path, tmp_path / "out", encoder=base(kind, merges))

    peer = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", require_pretrained=True).eval()
    image = torch.rand(4, 3, *encoder.image_spec.size)
    text = encoder.text_spec.encode(["the ring", "an arm"])
    with torch.no_grad():
        ours = model.encode_image(image, torch.ones(4))
        theirs = peer.encode_image(Normalize(encoder.mean, encoder.std)(image))
        unit = torch.nn.functional.normalize
        torch.testing.assert_close(unit(theirs, dim=-1), unit(ours, dim=-1), atol=1e-6, rtol=0)
        torch.testing.assert_close(theirs.norm(dim=-1), ours.norm(dim=-1))
        assert (model.encode_image(image) - ours).abs().max() > 0.01
        torch.testing.assert_close(peer.encode_text(text), model.encode_text(text))
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(tmp_path / "out" / "merges.txt.gz"), context_length=16)
    assert torch.equal(tokenizer(["the ring", "an arm"]), text)
    again = OpenCLIPEncoder(pretrained=str(tmp_path / "out"))
    assert (again.mean, again.activation, again.image_spec) == (encoder.mean, encoder.activation, encoder.image_spec)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["lora", "projection", "full"])
@pytest.mark.parametrize("rank", [3, 0])
def test_the_real_branch_with_its_text_side(merges, tmp_path, side: str, rank: int) -> None:
    """What a retrieval task on an aligned branch, or without one, is used for: real images and the trained texts."""
    images = {"rank": rank, "alpha": 6.0, "targets": ["q", "v"], "real_path": "frozen", "projection": False}
    texts = {"text_side": side, "text_rank": 2, "text_targets": ["v", "fc2"]}
    encoder = base("native", merges)
    model = routed(encoder, **images, **texts)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    recorded = {"aligned": images if rank else None, **texts}
    path = write(tmp_path / "a.ckpt", model, encoder, **recorded)
    kept = {k for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad or k in adapter_keys(model)}
    content = torch.load(path)
    content["state_dict"] = {f"encoder.{k}": model.state_dict()[k] for k in kept}
    content["base_fingerprint"] = fingerprint(model, ("image",) if side == "full" else ("image", "text"))
    torch.save(content, path)
    image = torch.rand(4, 3, *encoder.image_spec.size)
    text = encoder.text_spec.encode(["the ring", "an arm"])
    for branch, modality in (("real", 0), ("generated", 1)):
        export_checkpoint(path, tmp_path / branch, branch=branch, encoder=base("native", merges))
        peer = open_clip.create_model(f"local-dir:{tmp_path / branch}", require_pretrained=True).eval()
        with torch.no_grad():
            ours = model.encode_image(image, torch.full((4,), modality))
            torch.testing.assert_close(peer.encode_image(Normalize(encoder.mean, encoder.std)(image)), ours)
            torch.testing.assert_close(peer.encode_text(text), model.encode_text(text), atol=1e-5, rtol=1e-5)


def test_checkpoint_without_adapters_is_written_as_it_is(merges, tmp_path) -> None:
    torch.manual_seed(1)
    trained = OpenCLIPEncoder(config=CONFIGS["native"], merges=str(merges))
    path = write(tmp_path / "a.ckpt", trained, trained)
    export_checkpoint(path, tmp_path / "out")
    state = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert state.keys() == trained.model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in trained.model.state_dict().items())


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(merges, tmp_path) -> None:
    encoder = base("timm_without_matrix", merges)
    model = ModalityEncoder(encoder, branch=LoRA(), projection=True)
    settings = {"rank": 4, "alpha": 8.0, "targets": ["q", "v"], "projection": True}
    path = write(tmp_path / "a.ckpt", model, encoder, **settings)
    with pytest.raises(ValueError, match="projection of the images cannot be folded"):
        export_checkpoint(path, tmp_path / "out", encoder=base("timm_without_matrix", merges))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="trained on another base"):
        export_checkpoint(path, tmp_path / "out", encoder=base("native", merges))
    with pytest.raises(ValueError, match="only open_clip is known"):
        export_checkpoint(path, tmp_path / "out", to="onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        export_checkpoint(path, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_hugging_face_encoder_is_refused(merges, tmp_path, monkeypatch) -> None:
    encoder = base("native", merges)
    path = write(tmp_path / "a.ckpt", encoder, encoder)
    foreign = HFCLIPEncoder.__new__(HFCLIPEncoder)  # its type is all that counts
    torch.nn.Module.__init__(foreign)
    with pytest.raises(ValueError, match="holds a HFCLIPEncoder; to='open_clip' needs an OpenCLIPEncoder"):
        export_checkpoint(path, tmp_path / "out", encoder=foreign)
