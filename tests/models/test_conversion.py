"""CLIP between open_clip and transformers: names, configurations, vocabularies, the text tower by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip import CLIP
from tiny_encoders import TEXT, open_clip_config, timm_config
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.encoders.byte_pairs import clip_tokenizer, read_byte_pairs, tokenizer_byte_pairs
from gmail_lightning.models.encoders.clip_configs import hf_clip_config
from gmail_lightning.models.encoders.clip_configs import open_clip_config as to_open_clip_config
from gmail_lightning.models.encoders.conversion import clip_text_model, hf_clip_state, open_clip_state

WORDS = ["a red hand", "cat!", "the quick brown fox by the river " * 4]
EPS = {"vision_cfg": {**open_clip_config()["vision_cfg"], "norm_kwargs": {"eps": 1e-2}, "mlp_ratio": 2.0}}
CONFIGS = {
    "gelu": open_clip_config(),
    "quick_gelu": open_clip_config(quick_gelu=True),
    "eps": open_clip_config(**EPS),
    "custom_text": open_clip_config(custom_text=True),
}


def randomized(encoder: Any) -> Any:
    """Biases and norms are no longer zeros and ones, which any place would do for."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.ndim < 2 and parameter.numel() > 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_open_clip_as_a_model_of_transformers_and_back(kind: str, merges) -> None:
    torch.manual_seed(0)
    encoder = randomized(OpenCLIPEncoder(config=CONFIGS[kind], merges=str(merges)))
    model = CLIPModel(CLIPConfig(**hf_clip_config(encoder.model_config))).eval()
    model.load_state_dict(hf_clip_state(encoder.model.state_dict()), strict=True)
    pixels, ids = torch.randn(3, 3, 32, 32), encoder.text_spec.encode(WORDS)
    with torch.no_grad():
        found = model(pixel_values=pixels, input_ids=ids)
        images = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(images, encoder.model.encode_image(pixels), atol=1e-5, rtol=1e-5)
        texts = model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(texts, encoder.encode_text(ids), atol=1e-5, rtol=1e-5)
        cosines = torch.cosine_similarity(images[:, None], texts[None], dim=-1)
        torch.testing.assert_close(found.logits_per_image, encoder.logit_scale * cosines, atol=1e-4, rtol=1e-5)
    back = open_clip_state(model.state_dict())
    own = {key.removeprefix("text."): value for key, value in encoder.model.state_dict().items()}
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], value) for key, value in own.items())


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_transformers_as_a_model_of_open_clip_and_back(act: str, tiny) -> None:
    encoder = randomized(tiny("hf_clip"))
    for tower in (encoder.config.text_config, encoder.config.vision_config):
        tower.hidden_act = act
        tower.layer_norm_eps = 1e-3
    ours = CLIPModel(encoder.config).eval()
    ours.load_state_dict(encoder.model.state_dict())
    config = to_open_clip_config(encoder.config)
    peer = CLIP(**config).eval()
    peer.load_state_dict(open_clip_state(ours.state_dict()), strict=True)
    pixels, ids = torch.randn(3, 3, 32, 32), encoder.text_spec.encode(WORDS)
    with torch.no_grad():
        expected = ours.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(peer.encode_image(pixels), expected, atol=1e-5, rtol=1e-5)
        expected = ours.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(peer.encode_text(ids), expected, atol=1e-5, rtol=1e-5)
    back = hf_clip_state(peer.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    again = CLIPConfig(**hf_clip_config(config))
    for mine, theirs in (
        (again.text_config, ours.config.text_config),
        (again.vision_config, ours.config.vision_config),
    ):
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps"):
            assert getattr(mine, name) == getattr(theirs, name)
    assert again.text_config.eos_token_id == ours.config.text_config.eos_token_id


def test_an_end_that_is_not_the_highest_id_is_pooled_at(tiny) -> None:
    encoder = randomized(tiny("hf_clip"))
    encoder.config.text_config.eos_token_id = 77
    ours = CLIPModel(encoder.config).eval()
    peer = CLIP(**to_open_clip_config(encoder.config)).eval()
    peer.load_state_dict(open_clip_state(ours.state_dict()))
    ids = torch.randint(100, 500, (2, 16))
    ids[0, 5] = ids[0, 9] = ids[1, 3] = 77
    with torch.no_grad():
        expected = ours.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(peer.encode_text(ids), expected, atol=1e-5, rtol=1e-5)
    encoder.config.text_config.eos_token_id = 2  # the old form: the highest id
    old = CLIPModel(encoder.config).eval()
    peer = CLIP(**to_open_clip_config(encoder.config)).eval()
    peer.load_state_dict(open_clip_state(old.state_dict()))
    with torch.no_grad():
        expected = old.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(peer.encode_text(ids), expected, atol=1e-5, rtol=1e-5)


VISION = open_clip_config()["vision_cfg"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (timm_config(), r"init_logit_bias: -10; vision_cfg.timm_model_name: test_vit"),
        (
            open_clip_config(vision_cfg={**VISION, "layers": [1, 1, 1, 1]}),
            r"vision_cfg.layers: \[1, 1, 1, 1\] \(a ResN",
        ),
        (open_clip_config(multimodal_cfg={"width": 8}), "multimodal_cfg"),
        (open_clip_config(text_cfg={**TEXT, "hf_model_name": "roberta-base"}), "text_cfg.hf_model_name: roberta-base"),
        (open_clip_config(text_cfg={**TEXT, "no_causal_mask": True}), "text_cfg.no_causal_mask: True"),
        (open_clip_config(text_cfg={**TEXT, "pool_type": "last"}), "text_cfg.pool_type: last"),
        (open_clip_config(text_cfg={**TEXT, "act_kwargs": {"approximate": "tanh"}}), "text_cfg.act_kwargs"),
        (open_clip_config(vision_cfg={**VISION, "attentional_pool": True}), "vision_cfg.attentional_pool: True"),
        (open_clip_config(vision_cfg={**VISION, "no_ln_pre": True}), "vision_cfg.no_ln_pre: True"),
        (open_clip_config(vision_cfg={**VISION, "image_size": [32, 64]}), r"image_size: \[32, 64\] \(not square"),
    ],
)
def test_what_transformers_has_not_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"no form in transformers' CLIP.*{reason}"):
        hf_clip_config(config)


def test_what_open_clip_has_not_is_refused_by_name(tiny) -> None:
    with pytest.raises(ValueError, match="no form in open_clip's CLIP: model_type: siglip"):
        to_open_clip_config(tiny("hf_siglip").config)
    config = tiny("hf_clip").config
    config.vision_config.hidden_act = "gelu_pytorch_tanh"
    with pytest.raises(ValueError, match="hidden_act: gelu_pytorch_tanh and quick_gelu"):
        to_open_clip_config(config)
    state = tiny().model.state_dict()
    for name in ("logit_bias", "visual.transformer.resblocks.0.ls_1.gamma", "visual.attn_pool.query"):
        with pytest.raises(ValueError, match=f"The weight {name} has no place"):
            hf_clip_state({**state, name: torch.zeros(())})
    with pytest.raises(ValueError, match=r"The weight text_model\.head\.bias has no place"):
        open_clip_state({"text_model.head.bias": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["open_clip", "quick_gelu", "timm", "hf_clip"])
def test_the_text_tower_by_itself(kind: str, tiny: Callable[..., Any], tmp_path) -> None:
    encoder = randomized(tiny(kind))
    ids = encoder.text_spec.encode(WORDS)
    before = torch.random.get_rng_state()
    model = clip_text_model(encoder)
    assert torch.equal(before, torch.random.get_rng_state())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = encoder.text_tokens(ids)
        for one in (model, CLIPTextModel.from_pretrained(tmp_path).eval()):
            torch.testing.assert_close(one(input_ids=ids).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
        for parameter in model.parameters():
            parameter.zero_()  # it is a copy
        assert torch.equal(encoder.text_tokens(ids), expected)


def test_the_text_tower_has_its_lora_merged(tiny) -> None:
    encoder = randomized(tiny())
    ids = encoder.text_spec.encode(WORDS)
    plain = encoder.text_tokens(ids).detach()
    router = ModalityEncoder(encoder, branch=LoRA(), text_side="lora")
    for parameter in router.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = router.text_tokens(ids)
        found = clip_text_model(encoder)(input_ids=ids).last_hidden_state
    # Weights this large and the two libraries' order of sums: 3e-6 was seen.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.01


def test_a_text_tower_of_another_family_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="text tower of siglip is no CLIPTextModel"):
        clip_text_model(tiny("hf_siglip"))
    encoder = tiny()
    encoder.model_config["text_cfg"]["no_causal_mask"] = True
    with pytest.raises(ValueError, match="no_causal_mask"):
        clip_text_model(encoder)


def test_vocabularies(merges) -> None:
    from open_clip import SimpleTokenizer

    texts = [*WORDS, "hello!! it's 12 o'clock -- (RED)", "naïve café ☕", ""]
    for path, options in ((merges, {"bpe_path": str(merges)}), (None, {})):
        pairs = read_byte_pairs(path)
        tokenizer, peer = clip_tokenizer(pairs, 40), SimpleTokenizer(context_length=40, **options)
        assert len(tokenizer) == peer.vocab_size
        assert tokenizer_byte_pairs(tokenizer) == pairs
        for ids, expected in zip(tokenizer(texts, truncation=True).input_ids, peer(texts).tolist(), strict=True):
            assert ids == expected[: len(ids)]
            assert ids[-1] == peer.eot_token_id
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="CLIPTokenizer of 49409 ids, is none of CLIP's byte pairs"):
        tokenizer_byte_pairs(tokenizer)
