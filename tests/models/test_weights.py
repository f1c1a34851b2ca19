"""Weights that were saved from a wrapped or compiled model, and classes that a checkpoint names."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from tiny_encoders import hf_config
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder
from transformers import AutoConfig, AutoModel, CLIPImageProcessor

from gmail_lightning.export import export_checkpoint
from gmail_lightning.models import ClipCap, HFCLIPEncoder, HFImageEncoder, LoRA, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference
from gmail_lightning.models.branches.record import build_encoder
from gmail_lightning.models.captioners.language_model import build_language_model
from gmail_lightning.models.encoders.open_clip_loading import SHIPPED
from gmail_lightning.models.weights import plain_names
from gmail_lightning.tasks import AlignmentTask, RetrievalTask

WRAPPERS = {
    "ddp": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "a part compiled": lambda key: key.replace("resblocks.", "resblocks._orig_mod."),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a", "a"),
        ("a._orig_mod.b._orig_mod.weight", "a.b.weight"),
        ("a._fsdp_wrapped_module.b", "a.b"),
        ("a.module.b", "a.module.b"),  # of the model itself
        ("modules.a", "modules.a"),
        ("my_orig_mod.a", "my_orig_mod.a"),
    ],
)
def test_names(name: str, plain: str) -> None:
    assert plain_names({name: 1}) == {plain: 1}


def test_weights_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="hold a twice"):
        plain_names({"a": 1, "module.a": 2})


@wrapped
@pytest.mark.parametrize("kind", ["pt", "safetensors", "nested"])
def test_open_clip_loads_wrapped_weights(tmp_path: Path, wrap, kind: str) -> None:
    first = tiny_encoder()
    state = {wrap(key): value for key, value in first.model.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if kind == "nested" else state, path)
    second = OpenCLIPEncoder(config=first.model_config, pretrained=str(path), merges=str(first.merges))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@wrapped
def test_a_captioner_loads_wrapped_weights(tmp_path: Path, wrap) -> None:
    settings = {
        "image_dim": 8,
        "language_model": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
        "tokenizer": "emoji",
        "prefix_length": 2,
    }
    torch.manual_seed(0)
    first = ClipCap(**settings)
    torch.save({wrap(key): value for key, value in first.state_dict().items()}, tmp_path / "clipcap.pt")
    second = ClipCap(**settings, pretrained=str(tmp_path / "clipcap.pt"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture(scope="module")
def alignment(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alignment")
    saves = ModelCheckpoint(folder, filename="a", every_n_train_steps=1)
    trainer = quiet_trainer(folder, max_steps=1, enable_checkpointing=True, callbacks=[saves], limit_val_batches=0)
    trainer.fit(AlignmentTask(ModalityEncoder(tiny_encoder(), branch=LoRA(rank=2))), emoji_data(mode="paired"))
    return folder / "a.ckpt"


def test_a_checkpoint_of_a_compiled_encoder_loads(tmp_path: Path, alignment: Path) -> None:
    content = torch.load(alignment, weights_only=True)
    plain = content["state_dict"]
    content["state_dict"] = {key.replace("encoder.", "encoder._orig_mod.", 1): v for key, v in plain.items()}
    torch.save(content, tmp_path / "a.ckpt")
    task = AlignmentTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=tiny_encoder())
    branches = ModalityEncoder.from_checkpoint(tmp_path / "a.ckpt", tiny_encoder())
    second = RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(tmp_path / "a.ckpt"), text_side="lora"))
    for state in (task.state_dict(), second.state_dict()):
        assert all(torch.equal(state[key], value) for key, value in plain.items())
    assert all(torch.equal(branches.state_dict()[key.removeprefix("encoder.")], v) for key, v in plain.items())
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", encoder=tiny_encoder())
    export_checkpoint(alignment, tmp_path / "same", encoder=tiny_encoder())
    weights = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("out", "same")]
    assert weights[0] == weights[1]


HOSTILE = "raise SystemExit('imported')"


def test_a_checkpoint_has_no_module_imported(tmp_path: Path, alignment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for recorded in (
        {"encoder": {"class_path": "hostile.Encoder", "init_args": {}}},
        {"encoder": {"class_path": "OpenCLIPEncoder", "init_args": {"preprocess": {"class_path": "hostile.A"}}}},
        {"other": [{"class_path": "hostile.A"}], "encoder": {"class_path": "OpenCLIPEncoder"}},
        {"_instantiator": "hostile.make"},
    ):
        content = torch.load(alignment, weights_only=True)
        content["hyper_parameters"] |= recorded
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt names hostile\.\w+, and its module is not imported"):
            AlignmentTask.load_from_checkpoint(tmp_path / "a.ckpt")
        if "encoder" in recorded and "other" not in recorded:
            with pytest.raises(ValueError, match="is not imported"):
                build_encoder(recorded["encoder"], tmp_path / "a.ckpt", ModalityEncoder)
        assert "hostile" not in sys.modules
    content = torch.load(alignment, weights_only=True)
    content["branches"]["branch"] = {"class_path": "hostile.Branch", "init_args": {}}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is not imported"):
        ModalityEncoder(tiny_encoder(), aligned=str(tmp_path / "a.ckpt"))
    content = torch.load(alignment, weights_only=True)
    content["hyper_parameters"]["encoder"] = {"class_path": "hostile.Encoder"}
    torch.save(content, tmp_path / "a.ckpt")
    AlignmentTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=tiny_encoder())  # as the message says
    assert "hostile" not in sys.modules


def test_a_class_that_is_imported_is_built() -> None:
    recorded = {
        "encoder": {"class_path": "gmail_lightning.models.OpenCLIPEncoder", "init_args": {"pretrained": "emoji"}}
    }
    assert isinstance(build_encoder(recorded["encoder"], "a.ckpt", ModalityEncoder), OpenCLIPEncoder)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [WRAPPERS["ddp"], WRAPPERS["compiled"], WRAPPERS["both"]])
@pytest.mark.parametrize("kind", ["one file", "several", "torch"])
def test_folders_of_transformers_load_wrapped_weights(tmp_path: Path, wrap, kind: str, hf_tokenizer: str) -> None:
    config = hf_config("clip")
    torch.manual_seed(0)
    built = AutoModel.from_config(AutoConfig.for_model(**config))
    built.save_pretrained(tmp_path, max_shard_size="150KB" if kind == "several" else "1GB")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (kind == "several")
    for file in files:
        state = {wrap(key): value for key, value in load_file(file).items()}
        if kind == "torch":
            file.unlink()
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            save_file(state, file, metadata={"format": "pt"})
    if kind == "several":
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = {wrap(key): name for key, name in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    both = HFCLIPEncoder(str(tmp_path), tokenizer=hf_tokenizer)
    assert all(torch.equal(value, both.model.state_dict()[key]) for key, value in built.state_dict().items())
    alone = HFImageEncoder(str(tmp_path))
    assert fingerprint_difference(fingerprint(both), fingerprint(alone)) is None


@wrapped
def test_a_language_model_loads_wrapped_weights(tmp_path: Path, wrap) -> None:
    settings = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    first, words, _ = build_language_model(settings, "emoji")
    first.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({wrap(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    second, _, _ = build_language_model(str(tmp_path))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.slow
@wrapped
def test_a_folder_of_open_clip_loads_wrapped_weights(tmp_path: Path, wrap) -> None:
    folder = shutil.copytree(SHIPPED["emoji"], tmp_path / "folder")
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    file.unlink()
    save_file({wrap(key): value for key, value in state.items()}, file)
    first, second = OpenCLIPEncoder(pretrained="emoji"), OpenCLIPEncoder(pretrained=str(folder))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "model.visual.transformer", "model.transformer.resblocks.0"])
def test_a_compiled_encoder_has_the_fingerprint_of_the_plain_one(part: str) -> None:
    plain, compiled = tiny_encoder(), tiny_encoder()
    host, _, name = part.rpartition(".")
    inner = compiled.get_submodule(host)
    setattr(inner, name, torch.compile(getattr(inner, name), backend="eager"))
    first, second = (fingerprint(encoder, ("image", "text")) for encoder in (plain, compiled))
    assert first["weights"] == second["weights"]
    assert fingerprint_difference(first, second) is None
