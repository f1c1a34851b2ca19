import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny_encoders import VOCABULARY, hf_config

from gmail_lightning.models import HFCLIPEncoder, HFImageEncoder, LoRA, ModalityEncoder
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference
from gmail_lightning.types import ImageSpec


@pytest.fixture(params=["clip", "siglip"])
def saved(request, tiny, hf_tokenizer, tmp_path) -> tuple[str, Path]:
    """A model as transformers saves it, with tokenizer and image processor."""
    from transformers import AutoTokenizer, CLIPImageProcessor, SiglipImageProcessor

    tiny(f"hf_{request.param}", seed=3).model.half().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(hf_tokenizer).save_pretrained(tmp_path)
    if request.param == "clip":
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2)
    else:
        processor = SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    return request.param, tmp_path


def test_folder_gives_features_of_transformers_own_pipeline(saved, pixels) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    family, folder = saved
    encoder = HFCLIPEncoder(str(folder)).eval()
    expected = ImageSpec((32, 32), "crop", "bilinear") if family == "clip" else ImageSpec((32, 32), "squash", "bicubic")
    assert encoder.image_spec == expected
    assert encoder.pretrained
    assert encoder.activation == ("quick_gelu" if family == "clip" else "gelu_tanh")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    image = (pixels(encoder, 3) * 255).round()
    inputs = AutoImageProcessor.from_pretrained(folder)(image.byte(), return_tensors="pt")  # 32 x 32: no resizing
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["a red hand", "cat"], padding="max_length", max_length=16, return_tensors="pt"
    )
    ids = encoder.text_spec.encode(["a red hand", "cat"])
    assert torch.equal(ids, tokens.input_ids)
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, pixel_values=inputs.pixel_values)
        image_features, text_features = encoder.encode_image(image / 255), encoder.encode_text(ids)
        logits = encoder.logit_scale * torch.cosine_similarity(image_features[:, None], text_features[None], dim=-1)
        if encoder.logit_bias is not None:
            logits = logits + encoder.logit_bias
    assert image_features.shape == (3, encoder.embed_dim)
    torch.testing.assert_close(logits, output.logits_per_image, atol=2e-5, rtol=1e-5)
    assert (encoder.logit_bias is None) == (family == "clip")


@pytest.mark.parametrize("kind", ["hf_clip", "hf_siglip"])
def test_image_tokens_are_hidden_states_without_class_token(tiny, pixels, kind: str) -> None:
    encoder = tiny(kind)
    image = pixels(encoder, 2)
    with torch.no_grad():
        states = encoder.model.vision_model(encoder.normalize_pixels(image), output_hidden_states=True).hidden_states
        expected = states[-2][:, 1:] if kind == "hf_clip" else states[-2]
        torch.testing.assert_close(encoder.image_tokens(image), expected)
        assert encoder.image_tokens(image).shape == (2, 16, 64)
    with pytest.raises(IndexError, match="layer=-3: this tower has 2 blocks"):
        encoder.image_tokens(image, layer=-3)


def test_truncation_keeps_the_end_token_and_workers_can_have_the_tokenizer(tiny) -> None:
    encode = pickle.loads(pickle.dumps(tiny("hf_clip").text_spec.encode))
    ids = encode(["the " * 40, "a"])
    assert ids.shape == (2, 16)
    assert ids[0, -1] == VOCABULARY - 1
    assert tiny("hf_clip").encode_text(ids).isfinite().all()


def test_wrong_parts_are_refused(tiny, hf_tokenizer, saved, tmp_path) -> None:
    _, folder = saved
    with pytest.raises(ValueError, match="either model, or config together with tokenizer"):
        HFCLIPEncoder(config=hf_config("clip"))
    with pytest.raises(ValueError, match="is a bert model; known families: clip, siglip"):
        HFCLIPEncoder(config={"model_type": "bert"}, tokenizer=hf_tokenizer)
    small = hf_config("clip")
    small["text_config"]["vocab_size"] = VOCABULARY + 1
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCABULARY} ids, the text tower {VOCABULARY + 1}"):
        HFCLIPEncoder(config=small, tokenizer=hf_tokenizer)
    wrong_end = hf_config("clip")
    wrong_end["text_config"]["eos_token_id"] = 5
    with pytest.raises(ValueError, match=f"ends texts with id {VOCABULARY - 1}, the text tower pools at 5"):
        HFCLIPEncoder(config=wrong_end, tokenizer=hf_tokenizer)
    with pytest.raises(RuntimeError, match=r"(?s)no-such/model did not load.*HF_HUB_OFFLINE=1"):
        HFCLIPEncoder("no-such/model")

    encoder = HFCLIPEncoder(str(folder))
    with pytest.raises(ValueError, match=r"shape \(1, 77\), but this text tower has context length 16"):
        encoder.encode_text(torch.zeros(1, 77, dtype=torch.int64))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 48}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=r"only 'shorter side and centre crop' and 'squash'"):
        HFCLIPEncoder(str(folder))
    encoder.model.vision_model.save_pretrained(folder)  # half a model is no model
    with pytest.raises(ValueError, match=r"is a \w+ model; known families|lacks \d+ weights"):
        HFCLIPEncoder(str(folder))


def test_the_tower_alone_is_that_of_the_dual_encoder(saved, pixels) -> None:
    family, folder = saved
    both, alone = HFCLIPEncoder(str(folder)).eval(), HFImageEncoder(str(folder)).eval()
    assert (alone.image_spec, alone.mean, alone.std) == (both.image_spec, both.mean, both.std)
    assert alone.pretrained
    assert {parameter.dtype for parameter in alone.parameters()} == {torch.float32}
    assert fingerprint_difference(fingerprint(both), fingerprint(alone)) is None
    image = pixels(alone, 2)
    with torch.no_grad():
        for layer in (-1, -2, 0):
            assert torch.equal(alone.image_tokens(image, layer), both.image_tokens(image, layer))
        pooled = alone.encode_image(image)
        joint = both.model.visual_projection(pooled) if family == "clip" else pooled
        torch.testing.assert_close(joint, both.encode_image(image))
    assert pooled.shape == (2, alone.embed_dim)
    assert alone.lora_targets(("q",), "text") == []

    branches = ModalityEncoder(both, branch=LoRA(rank=2)), ModalityEncoder(alone, branch=LoRA(rank=2))
    assert branches[1].text_spec is None
    for branch in branches:  # adapters have the same names in both
        torch.manual_seed(5)
        for _, parameter in sorted(branch.image_adapters()):
            torch.nn.init.normal_(parameter, std=0.1)
    generated = torch.ones(2, dtype=torch.int64)
    with torch.no_grad():
        torch.testing.assert_close(*(branch.image_tokens(image, generated) for branch in branches))
        assert not torch.equal(branches[1].image_tokens(image, generated), branches[1].image_tokens(image))


def test_recomputed_activations_of_the_tower_alone(saved, pixels) -> None:
    grads = []
    for recompute in (False, True):
        encoder = HFImageEncoder(str(saved[1]), grad_checkpointing=recompute)
        encoder.image_tokens(pixels(encoder, 2)).sum().backward()
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def test_towers_of_another_kind_or_without_weights_are_refused(saved, tmp_path_factory) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    other = tmp_path_factory.mktemp("other")
    AutoConfig.for_model("bert").save_pretrained(other)
    with pytest.raises(ValueError, match="a tower of kind bert; known: clip_vision_model, siglip_vision_model"):
        HFImageEncoder(str(other))
    with pytest.raises(RuntimeError, match=r"(?s)no-such/model did not load.*HF_HUB_OFFLINE=1"):
        HFImageEncoder("no-such/model")
    _, folder = saved
    AutoConfig.from_pretrained(folder).save_pretrained(other)
    (other / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("vision_model.encoder.layers.1.")}
    assert len(kept) < len(weights)
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its image tower"):
        HFImageEncoder(str(other))
