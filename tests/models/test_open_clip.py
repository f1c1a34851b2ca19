import gzip
import json
import pickle
from itertools import pairwise
from types import SimpleNamespace

import open_clip
import pytest
import torch
from tiny_encoders import MERGES, VOCABULARY, open_clip_config
from torchvision.transforms import Normalize

from gmail_lightning.models import OpenCLIPEncoder
from gmail_lightning.models.encoders.open_clip import save_open_clip
from gmail_lightning.models.encoders.open_clip_loading import read_preprocess
from gmail_lightning.types import ImageSpec

PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash", "interpolation": "bilinear"}


@pytest.fixture
def folder(merges, tmp_path):
    """A model saved in half precision, with merges and pixel statistics of its own."""
    torch.manual_seed(7)
    encoder = OpenCLIPEncoder(config=open_clip_config(quick_gelu=True), merges=str(merges), preprocess=PREPROCESS)
    half = {key: value.half() for key, value in encoder.model.state_dict().items()}
    save_open_clip(tmp_path / "clip", encoder.model_config, encoder.preprocess_config, half, merges)
    return tmp_path / "clip"


def test_features_are_those_of_open_clip(tiny, pixels) -> None:
    encoder = tiny()
    image, text = pixels(encoder, 3), encoder.text_spec.encode(["a cat", "the dog"])
    normalize = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        expected_image, expected_text, scale = encoder.model(normalize(image), text)
        image_features, text_features = encoder.encode_image(image), encoder.encode_text(text)
    assert image_features.norm(dim=-1).std() > 0  # not normalised
    torch.testing.assert_close(image_features / image_features.norm(dim=-1, keepdim=True), expected_image)
    torch.testing.assert_close(text_features / text_features.norm(dim=-1, keepdim=True), expected_text)
    assert encoder.logit_scale == scale
    assert encoder.logit_bias is None
    assert tiny("timm").logit_bias.item() == -10
    assert (encoder.embed_dim, encoder.activation, encoder.pretrained) == (32, "gelu", False)
    assert encoder.image_spec == ImageSpec((32, 32), "crop", "bicubic")


def test_folder_says_it_all(folder, pixels) -> None:
    encoder = OpenCLIPEncoder(pretrained=str(folder)).eval()
    assert (encoder.activation, encoder.pretrained) == ("quick_gelu", True)
    assert (encoder.mean, encoder.std) == (tuple(PREPROCESS["mean"]), tuple(PREPROCESS["std"]))
    assert encoder.image_spec == ImageSpec((32, 32), "squash", "bilinear")
    assert encoder.text_spec.context_length == 16
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}

    peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(folder / "merges.txt.gz"), context_length=16)
    image, text = pixels(encoder, 2), ["a red hand", "dog"]
    with torch.no_grad():
        features = peer.eval().encode_image(transform.transforms[-1](image))
        torch.testing.assert_close(encoder.encode_image(image), features)
        ids = encoder.text_spec.encode(text)
        assert torch.equal(ids, tokenizer(text))
        torch.testing.assert_close(encoder.encode_text(ids), peer.encode_text(ids))


def test_configuration_with_a_file_of_weights(folder, merges, tmp_path) -> None:
    reference = OpenCLIPEncoder(pretrained=str(folder)).model.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.items()}}, tmp_path / "weights.pt")
    arguments = {"config": open_clip_config(quick_gelu=True), "merges": str(merges)}
    for file in (tmp_path / "weights.pt", folder / "open_clip_model.safetensors"):
        loaded = OpenCLIPEncoder(pretrained=str(file), **arguments)
        assert loaded.pretrained
        assert all(torch.equal(reference[key], value) for key, value in loaded.model.state_dict().items())
    arguments["config"]["vision_cfg"]["layers"] = 3
    with pytest.raises(
        RuntimeError, match=r"(?s)weights.pt does not fit config: .*resblocks.2.*gmail-lightning export"
    ):
        OpenCLIPEncoder(pretrained=str(tmp_path / "weights.pt"), **arguments)


def test_cut_vocabulary_is_contiguous_and_keeps_the_end(tiny, merges) -> None:
    encode = pickle.loads(pickle.dumps(tiny().text_spec.encode))
    ids = encode(["a red hand, waving!", "the " * 40, ""])
    start, end = VOCABULARY - 2, VOCABULARY - 1
    assert ids.shape == (3, 16)
    assert ids.dtype == torch.int64
    assert ids[:, 0].tolist() == [start] * 3
    assert ids.argmax(dim=1).tolist() == [ids[0].tolist().index(end), 15, 1]  # where CLIP pools, also when truncated
    assert ids.max() == end
    # Independently: greedy merging by rank, over the file's own list.
    ranks = {tuple(m.split()): i for i, m in enumerate(gzip.decompress(merges.read_bytes()).decode().split("\n")[1:])}
    symbols = list(open_clip.tokenizer.bytes_to_unicode().values())
    vocabulary = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in ranks)]
    expected = []
    for word in ("a", "red", "hand", ",", "waving", "!"):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while pairs := [p for p in pairwise(parts) if p in ranks]:
            i = list(pairwise(parts)).index(min(pairs, key=ranks.__getitem__))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        expected += [vocabulary.index(part) for part in parts]
    assert ids[0, 1:].tolist()[: len(expected) + 1] == [*expected, end][:15]


def test_merges_that_do_not_fit_are_refused(merges, tmp_path) -> None:
    config = open_clip_config()
    config["text_cfg"]["vocab_size"] = 600
    with pytest.raises(ValueError, match=f"has {MERGES} merges: text_cfg.vocab_size must be {VOCABULARY}, not 600"):
        OpenCLIPEncoder(config=config, merges=str(merges))
    with pytest.raises(ValueError, match="vocab_size is 600, but the tokenizer has 49408 ids"):
        OpenCLIPEncoder(config=config)
    blank = tmp_path / "blank.gz"
    blank.write_bytes(gzip.compress(gzip.decompress(merges.read_bytes()) + b"\n"))
    with pytest.raises(ValueError, match=r"blank.gz, line 66: expected two symbols, got ''"):
        OpenCLIPEncoder(config=open_clip_config(), merges=str(blank))
    with pytest.raises(ValueError, match=r"there is no file nowhere.gz"):
        OpenCLIPEncoder(config=open_clip_config(), merges="nowhere.gz")


@pytest.mark.parametrize("layer", [-2, -1, 0])
@pytest.mark.parametrize("kind", ["open_clip", "timm"])
def test_image_tokens_are_the_patches_of_one_block(tiny, pixels, kind: str, layer: int) -> None:
    encoder = tiny(kind)
    blocks = encoder.model.visual.trunk.blocks if kind == "timm" else encoder.model.visual.transformer.resblocks
    outputs = []
    blocks[layer].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    last_runs = []
    blocks[-1].register_forward_hook(lambda *_: last_runs.append(True))
    with torch.no_grad():
        encoder.encode_image(image := pixels(encoder, 2))
        last_runs.clear()
        tokens = encoder.image_tokens(image, layer=layer)
    torch.testing.assert_close(tokens, outputs[0][:, 1:])
    assert bool(last_runs) == (layer == -1)
    with pytest.raises(IndexError, match=rf"layer=9: this tower has {len(blocks)} blocks"):
        encoder.image_tokens(image, layer=9)


def test_input_of_the_wrong_form_is_refused(tiny) -> None:
    encoder = tiny()
    with pytest.raises(ValueError, match=r"shape \(B, 3, 32, 32\), got torch.uint8 of shape \(1, 3, 32, 32\)"):
        encoder.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 3, 64, 64\)"):
        encoder.image_tokens(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"shape \(2, 77\), but this text tower has context length 16"):
        encoder.encode_text(open_clip.tokenize(["a", "b"]))


def test_descriptions_that_contradict_or_mislead_are_refused(folder, merges, tmp_path) -> None:
    with pytest.raises(ValueError, match="exactly one description of the model"):
        OpenCLIPEncoder()
    with pytest.raises(ValueError, match="exactly one description of the model"):
        OpenCLIPEncoder("ViT-B-32", str(folder))
    with pytest.raises(ValueError, match="brings its own weights"):
        OpenCLIPEncoder("hf-hub:some/model", "openai")
    with pytest.raises(ValueError, match=r"not known to open_clip. Close: .*ViT-B-32"):
        OpenCLIPEncoder("ViT-B32")
    with pytest.raises(ValueError, match=r"'openai' was trained with QuickGELU, but ViT-B-32 builds GELU"):
        OpenCLIPEncoder("ViT-B-32", "openai")
    with pytest.raises(ValueError, match=r"safetensors' was trained with QuickGELU, but config builds GELU. Use pretr"):
        OpenCLIPEncoder(pretrained=str(folder / "open_clip_model.safetensors"), config=open_clip_config())
    with pytest.raises(ValueError, match="neither a file, nor a folder, nor a tag of config"):
        OpenCLIPEncoder(pretrained="laion2b", config=open_clip_config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no open_clip_config.json"):
        OpenCLIPEncoder(pretrained=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"unknown \['size'\]; known: mean, std, interpolation, resize_mode"):
        OpenCLIPEncoder(config=open_clip_config(), merges=str(merges), preprocess={"size": 3})
    (folder / "open_clip_model.safetensors").unlink()  # never random weights in their place
    with pytest.raises(RuntimeError, match="could not be loaded"):
        OpenCLIPEncoder(pretrained=str(folder))


def test_without_network_the_fix_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"did not load: .*give a local file or folder.*HF_HUB_OFFLINE=1"):
        OpenCLIPEncoder("ViT-B-32-quickgelu", "openai")


def test_pixel_statistics_of_a_bare_file_are_those_of_all_tags() -> None:
    model = SimpleNamespace(visual=SimpleNamespace(image_size=(224, 224)))
    siglip = read_preprocess(model, "ViT-B-16-SigLIP", "weights.pt", None)
    assert (siglip["mean"], siglip["std"], siglip["resize_mode"]) == ((0.5,) * 3, (0.5,) * 3, "squash")
    mixed = "ViT-L-14"  # its tags differ
    with pytest.raises(ValueError, match=r"the tags of ViT-L-14 differ in mean"):
        read_preprocess(model, mixed, "weights.pt", None)
    given = read_preprocess(model, mixed, "weights.pt", PREPROCESS)
    assert {key: given[key] for key in PREPROCESS} == PREPROCESS


def test_saved_configuration_is_open_clips(folder) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["model_cfg"] == open_clip_config(quick_gelu=True)
    assert config["preprocess_cfg"]["resize_mode"] == "squash"
