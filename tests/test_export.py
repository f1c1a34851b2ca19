import gzip
import stat
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from tiny_encoders import routed
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_pil_image
from transformers import AutoProcessor, CLIPModel

from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.export import export_checkpoint
from gmail_lightning.models import DualEncoder, HFCLIPEncoder, HFImageEncoder, LoRA, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.branches.adapters import adapter_keys
from gmail_lightning.models.branches.fingerprint import fingerprint
from gmail_lightning.models.encoders.byte_pairs import clip_tokenizer, read_byte_pairs

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
    with pytest.raises(ValueError, match="only open_clip, hf_clip and diffusers are known"):
        export_checkpoint(path, tmp_path / "out", to="onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        export_checkpoint(path, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_another_encoder_is_refused(merges, tmp_path) -> None:
    encoder = base("native", merges)
    path = write(tmp_path / "a.ckpt", encoder, encoder)
    foreign = HFImageEncoder.__new__(HFImageEncoder)  # its type is all that counts
    torch.nn.Module.__init__(foreign)
    with pytest.raises(ValueError, match="holds a HFImageEncoder; export needs an OpenCLIPEncoder or HFCLIPEncoder"):
        export_checkpoint(path, tmp_path / "out", encoder=foreign)


SENTENCES = ["the ring", "an arm!", "hello &  the THING, in a row of far more words than there is room for " * 2]


def trained_router(encoder: DualEncoder, path: Path, **settings) -> ModalityEncoder:
    """A router with LoRA and a projection whose tensors are random, and its checkpoint."""
    model = routed(encoder, rank=3, alpha=6.0, targets=["q", "v", "out", "fc1", "fc2"], projection=True, **settings)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    kept = {k for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad or k in adapter_keys(model)}
    content = {"state_dict": {f"encoder.{k}": model.state_dict()[k] for k in kept}, "branches": model.record()}
    torch.save({**content, "base_fingerprint": fingerprint(model)}, path)
    return model


def hf_base(folder: Path, act: str = "quick_gelu") -> HFCLIPEncoder:
    """Of transformers, with a tokenizer that pads with the end."""
    config = {
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"vocab_size": 522, "max_position_embeddings": 16, "hidden_act": act}
        | {"bos_token_id": 520, "eos_token_id": 521, "pad_token_id": 521},
        "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 32, "patch_size": 8, "hidden_act": act},
    }
    torch.manual_seed(0)
    return HFCLIPEncoder(config=config, tokenizer=str(folder))


@pytest.fixture
def words(merges, tmp_path) -> Path:
    clip_tokenizer(read_byte_pairs(merges), 16).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize("kind", ["native", "gelu", "hf_quick_gelu", "hf_gelu"])
@pytest.mark.parametrize("branch", ["generated", "real"])
def test_plain_libraries_give_what_was_trained(merges, words, tmp_path, kind: str, branch: str) -> None:
    """Either encoder, either form: LoRA, a projection on the images and one on the texts."""

    def build() -> DualEncoder:
        if kind.startswith("hf_"):
            return hf_base(words, kind.removeprefix("hf_"))
        torch.manual_seed(0)
        return OpenCLIPEncoder(config=CONFIGS["native"] | {"quick_gelu": kind == "native"}, merges=str(merges))

    model = trained_router(build(), tmp_path / "a.ckpt", text_side="projection")
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)  # 32 x 32: no resizing
    ids = model.text_spec.encode(SENTENCES)
    with torch.no_grad():
        images = model.encode_image(image / 255, torch.full((3,), int(branch == "generated")))
        texts = model.encode_text(ids)
    for to in ("open_clip", "hf_clip"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / to, to=to, branch=branch, encoder=build())

    peer = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}", require_pretrained=True).eval()
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(tmp_path / "open_clip" / "merges.txt.gz"), context_length=16)
    transform = image_transform_v2(PreprocessCfg(**peer.visual.preprocess_cfg), is_train=False)
    pixels = torch.stack([transform(to_pil_image(one)) for one in image])
    hf = CLIPModel.from_pretrained(tmp_path / "hf_clip").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf_clip")
    inputs = processor(
        images=list(image), text=["the ring", "an arm!"], padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
        close(peer.encode_image(pixels), images)
        close(peer.encode_text(tokenizer(SENTENCES[:2])), texts[:2])
        close(hf.get_image_features(pixel_values=inputs.pixel_values).pooler_output, images)
        close(hf.get_text_features(input_ids=inputs.input_ids).pooler_output, texts[:2])
        assert inputs.input_ids.shape == (2, 16)
        close(hf.logit_scale.exp(), model.logit_scale)

        again = HFCLIPEncoder(str(tmp_path / "hf_clip")).eval()
        assert again.image_spec == model.image_spec
        assert again.activation == model.plain.activation
        close(again.encode_image(image / 255), images)
        plain = build().eval().encode_image(image / 255)
        assert torch.allclose(images, plain, atol=1e-5) == (branch == "real")
        ours = OpenCLIPEncoder(pretrained=str(tmp_path / "open_clip")).eval()
        close(ours.encode_text(ours.text_spec.encode(SENTENCES[:2])), texts[:2])
        assert ours.image_spec == model.image_spec


def test_there_and_back_no_bit_changes(merges, tmp_path) -> None:
    first = base("native", merges)
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = write(tmp_path / "a.ckpt", first, first)
    export_checkpoint(path, tmp_path / "hf", to="hf_clip")
    second = HFCLIPEncoder(str(tmp_path / "hf"))
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in second.state_dict().items()}}, tmp_path / "b.ckpt")
    export_checkpoint(tmp_path / "b.ckpt", tmp_path / "back", to="open_clip", encoder=second)
    third = OpenCLIPEncoder(pretrained=str(tmp_path / "back"))
    assert third.model.state_dict().keys() == first.model.state_dict().keys()
    assert all(torch.equal(v, third.model.state_dict()[k]) for k, v in first.model.state_dict().items())
    assert torch.equal(third.text_spec.encode(SENTENCES), first.text_spec.encode(SENTENCES))
    assert (
        gzip.decompress((tmp_path / "back" / "merges.txt.gz").read_bytes()).decode().split("\n")[1:]
        == (gzip.decompress(merges.read_bytes()).decode().split("\n")[1:])
    )
    export_checkpoint(path, tmp_path / "half", to="hf_clip", dtype="float16")
    assert CLIPModel.from_pretrained(tmp_path / "half").dtype == torch.float16
    assert stat.S_IMODE((tmp_path / "half" / "model.safetensors").stat().st_mode) & 0o044


def test_the_embedded_clip_as_one_of_transformers(tmp_path) -> None:
    encoder = OpenCLIPEncoder(pretrained="emoji").eval()
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in encoder.state_dict().items()}}, tmp_path / "a.ckpt")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", to="hf_clip", encoder=encoder)
    captions = [EmojiDataset().captions(index)[0] for index in range(0, 300, 10)] + ["a cat!", "hello !!"]
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    ids, expected = (
        tokenizer(captions, padding="max_length", return_tensors="pt").input_ids,
        encoder.tokenizer(captions),
    )
    assert len(tokenizer) == encoder.tokenizer.vocab_size
    end = expected.argmax(dim=1)[:, None]
    inside = torch.arange(ids.shape[1]) <= end
    assert torch.equal(ids[inside], expected[inside])
    assert (ids[~inside] == tokenizer.eos_token_id).all()
    model = CLIPModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(found, encoder.encode_text(expected), atol=1e-5, rtol=1e-5)


def test_what_has_no_such_form_is_refused_and_nothing_is_written(merges, words, tmp_path) -> None:
    encoder = base("timm", merges)
    path = write(tmp_path / "a.ckpt", encoder, encoder)
    with pytest.raises(ValueError, match=r"no form in transformers' CLIP: vision_cfg.timm_model_name: test_vit"):
        export_checkpoint(path, tmp_path / "out", to="hf_clip", encoder=encoder)
    larger = OpenCLIPEncoder(config=CONFIGS["native"] | {"text_cfg": TEXT | {"vocab_size": 49410}})
    path = write(tmp_path / "b.ckpt", larger, larger)
    with pytest.raises(ValueError, match=r"text_cfg.vocab_size is 49410, and the tokenizer has 49408 ids"):
        export_checkpoint(path, tmp_path / "out", to="hf_clip", encoder=larger)
    longest = OpenCLIPEncoder(config=CONFIGS["native"], merges=str(merges), preprocess={"resize_mode": "longest"})
    path = write(tmp_path / "c.ckpt", longest, longest)
    with pytest.raises(ValueError, match=r"resize_mode 'longest'"):
        export_checkpoint(path, tmp_path / "out", to="hf_clip", encoder=longest)
    foreign = hf_base(words)
    foreign.tokenizer.add_tokens(["<more>"])
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in foreign.state_dict().items()}}, tmp_path / "d.ckpt")
    with pytest.raises(ValueError, match=r"is none of CLIP's byte pairs"):
        export_checkpoint(tmp_path / "d.ckpt", tmp_path / "out", to="open_clip", encoder=foreign)
    assert not (tmp_path / "out").exists()
