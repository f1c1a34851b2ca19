"""``Llava`` against ``LlavaForConditionalGeneration`` and its processor on the same weights; chat templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gmail_lightning.models import HFCLIPEncoder, HFImageEncoder, Llava, PatchTokens
from gmail_lightning.models.captioners.chat import chat_format
from gmail_lightning.models.captioners.language_model import load_tokenizer
from gmail_lightning.models.restoring import restoring

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
#: That of LLaVA 1.5 on the hub: contents as lists of parts, and no token that ends an answer.
OF_LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\n' }}{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
#: As Llama 3's: contents as strings, trimmed, with a beginning and an end of turn.
OF_LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start|>' + m['role'] + '<|end|>\n\n' "
    "+ m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
CAPTIONS = ["a red hand", "two grinning cats, and a dog", "tea"]
QUESTIONS = ["Which animals?", "", "What is in the cup, and who drinks it at four o'clock?"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory) -> Path:
    """A LLaVA as transformers saves it, with its processor."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    path = tmp_path_factory.mktemp("llava")
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = load_tokenizer("emoji")
    ids = {"vocab_size": len(words), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    is_clip = request.param == "clip"
    settings = LlavaConfig(
        vision_config={"model_type": f"{request.param}_vision_model", **width, "image_size": 32, "patch_size": 8},
        text_config={**LLAMA, **ids},
        image_token_id=2,
        vision_feature_select_strategy="default" if is_clip else "full",
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(settings)
    for parameter in model.parameters():  # far from the start, where every word is as likely as another
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy=settings.vision_feature_select_strategy,
        num_additional_image_tokens=int(is_clip), chat_template=OF_LLAVA,
    ).save_pretrained(path)  # fmt: skip
    return path


def reference(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def conversation(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def llava(**settings: Any) -> Llava:
    """From parts: a new Llama."""
    torch.manual_seed(0)
    usual = {"language_model": LLAMA, "tokenizer": "emoji", "image_dim": 8, "tune": "full"}
    return Llava(**{**usual, **settings}).eval()


def image_tokens(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(2))


def test_loss_and_captions_are_those_of_transformers_own_llava(folder: Path) -> None:
    theirs, processor = reference(folder)
    encoder, ours = HFImageEncoder(str(folder)).eval(), Llava(str(folder), tune="full").eval()
    assert (ours.pretrained, ours.reader, ours.image_dim) == (True, PatchTokens(-2), 64)
    image = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 255).round()  # no resizing
    asked = [question or "Provide a one-sentence caption for the provided image." for question in QUESTIONS]
    prompts = [processor.apply_chat_template(conversation(q), add_generation_prompt=True) for q in asked]
    whole = [f"{prompt} {caption}<|endoftext|>" for prompt, caption in zip(prompts, CAPTIONS, strict=True)]
    inputs = processor(images=list(image.byte()), text=whole, return_tensors="pt", padding=True, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(processor(images=image[0].byte(), text=prompt).input_ids[0])] = -100
    expected = theirs(**inputs, labels=labels)
    tokens = encoder.image_tokens(image / 255, layer=ours.reader.layer)
    loss = ours.loss(tokens, ours.encode(CAPTIONS, QUESTIONS))
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)

    logits = ours.language_model(
        inputs_embeds=ours._embed(inputs["input_ids"], (inputs["input_ids"] == 2).int().argmax(dim=1), tokens),
        attention_mask=inputs["attention_mask"],
    ).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)
    assert expected.logits[seen].std() > 0.1

    inputs = processor(images=list(image.byte()), text=prompts, return_tensors="pt", padding=True, padding_side="left")
    different = set()
    for beams in (1, 3):
        ids = theirs.generate(
            **inputs, num_beams=beams, max_new_tokens=9, do_sample=False, early_stopping="never" if beams > 1 else False
        )
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected_texts = [" ".join(text.split()) for text in texts]
        assert (
            ours.generate(tokens, ours.encode_questions(QUESTIONS), num_beams=beams, max_new_tokens=9) == expected_texts
        )
        different.update(expected_texts)
    assert len(different) > 2


def test_gradients_of_parts_are_those_of_the_whole(folder: Path) -> None:
    theirs, processor = reference(folder)
    ours = Llava(str(folder), tune="projector").train()
    assert not ours.language_model.training
    image = (torch.rand(1, 3, 32, 32) * 255).round()
    prompt = processor.apply_chat_template(conversation("Who?"), add_generation_prompt=True)
    inputs = processor(images=image[0].byte(), text=f"{prompt} a cat<|endoftext|>", return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, : len(processor(images=image[0].byte(), text=prompt).input_ids[0])] = -100
    theirs(**inputs, labels=labels).loss.backward()
    tokens = HFImageEncoder(str(folder)).image_tokens(image / 255).detach()
    ours.loss(tokens, ours.encode(["a cat"], ["Who?"])).backward()
    expected = theirs.model.multi_modal_projector
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == name.startswith("projector."), name
        if parameter.requires_grad:
            grad = expected.get_parameter(name.removeprefix("projector.")).grad
            torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-4)


def test_padding_changes_no_caption_and_no_loss() -> None:
    model, tokens = llava(), image_tokens()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    together = model.generate(tokens, model.encode_questions(QUESTIONS), num_beams=2, max_new_tokens=8)
    asked = [model.encode_questions([question]) for question in QUESTIONS]
    alone = [model.generate(tokens[i : i + 1], asked[i], num_beams=2, max_new_tokens=8)[0] for i in range(3)]
    assert together == alone
    counts = torch.tensor([len(answer) for _, answer in model.chat.tokens(QUESTIONS, CAPTIONS)])
    single = [model.encode(CAPTIONS[i : i + 1], QUESTIONS[i : i + 1]) for i in range(3)]
    losses = [model.loss(tokens[i : i + 1], single[i]) for i in range(3)]
    ids = model.encode(CAPTIONS, QUESTIONS)
    expected = (torch.stack(losses) * counts).sum() / counts.sum()
    assert model.loss(tokens, ids).item() == pytest.approx(expected.item(), rel=1e-5)
    weight = torch.tensor([2.0, 0.0, 1.0])
    expected = (torch.stack(losses) * counts * weight).sum() / (counts * weight).sum()
    assert model.loss(tokens, ids, weight=weight).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.generate(tokens[:0]) == []


def test_only_the_answer_is_learned_and_ids_decode_to_the_template() -> None:
    model = llava(prompt="What is it?")
    rows = model.chat.tokens(["", "Who <image> now?"], ["a cat", ""])
    decoded = [[model.tokenizer.decode(part) for part in row] for row in rows]
    assert decoded[0] == ["USER: <image>\nWhat is it? ASSISTANT:", " a cat<|endoftext|>"]
    assert decoded[1] == ["USER: <image>\nWho   now? ASSISTANT:", " <|endoftext|>"]  # one place for the image
    inputs = model._inputs(model.encode(["a cat", "tea"], ["", "Who?"]), 5)
    learned = inputs.labels != -100
    assert torch.equal(inputs.labels[learned], inputs.ids[learned])
    assert [model.tokenizer.decode(inputs.ids[i][learned[i]]) for i in (0, 1)] == [
        " a cat<|endoftext|>",
        " tea<|endoftext|>",
    ]
    assert (inputs.ids == model.chat.image_id).sum(dim=1).tolist() == [5, 5]
    assert not (learned & ~inputs.mask).any()


def test_a_tokenizer_without_a_placeholder_needs_no_embedding_for_it() -> None:
    model = llava(prompt="Who?")
    expected = model.loss(image_tokens(), model.encode(CAPTIONS))
    known = len(model.tokenizer)
    model.chat = type(model.chat)(model.tokenizer, "<picture>", "Who?")
    assert model.chat.image_id == known == model.language_model.get_input_embeddings().num_embeddings
    assert model.loss(image_tokens(), model.encode(CAPTIONS)).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("template", [OF_LLAVA, OF_LLAMA3, None])
def test_a_format_renders_what_the_template_renders(template: str | None) -> None:
    tokenizer = load_tokenizer("emoji")
    tokenizer.add_tokens(["<|eot|>", "<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    found = chat_format(tokenizer, "<image>")
    parts = template == OF_LLAVA
    asked = [{"type": "image"}, {"type": "text", "text": "Who?"}] if parts else "<image>\nWho?"
    answered = [{"type": "text", "text": "a cat"}] if parts else "a cat"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    assert found.prompt("Who?") == tokenizer.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = whole.rstrip() + "<|endoftext|>" if parts else whole  # LLaVA's own template never ends an answer
    assert found.prompt("Who?") + found.answer("a cat") == expected
    assert tokenizer.convert_ids_to_tokens(found.end_id) == ("<|eot|>" if template == OF_LLAMA3 else "<|endoftext|>")


def test_a_tokenizer_that_begins_texts_itself_does_so_once(tmp_path: Path) -> None:
    from tokenizers import processors

    model = llava()
    tokenizer = model.tokenizer
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.bos_token = "<s>"
    kind = type(model.chat)
    assert kind(tokenizer, "<image>", "Who?").tokens([""], ["a"])[0][0][:2] == [start, tokenizer("USER").input_ids[1]]
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert kind(tokenizer, "<image>", "Who?").tokens([""], ["a"])[0][0].count(start) == 1


def test_templates_that_do_not_fit_are_refused() -> None:
    for template, message in (
        (
            "{{ messages[0]['content'] }}{% if messages | length > 1 %} yes{% endif %}",
            r"(?s)the prompt is .*the conversation",
        ),
        ("{{ messages[0]['role'] }}", "the prompt is 'user'"),
        ("{{ raise_exception('no images') }}", r"it fails \(no images\)"),
    ):
        with pytest.raises(ValueError, match=message):
            llava(chat_template=template)
    joined = "{{ messages[0]['content'] }} it is c{% if messages | length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    with pytest.raises(ValueError, match="the tokenizer joins its end with the answer"):
        llava(chat_template=joined)
    tokenizer = load_tokenizer("emoji")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_format(tokenizer, "<image>")


def test_long_answers_are_cut_and_counted_and_none_is_masked_as_a_whole() -> None:
    prompt = len(llava().chat.tokens([""], ["x"])[0][0]) + 4  # the image is five tokens in place of one
    model = llava(max_length=prompt + 7)
    with pytest.warns(UserWarning, match=f"max_length={prompt + 7} cuts 1 of 2 answers"):
        inputs = model._inputs(model.encode(["a cat and a dog and " * 20, "tea"]), 5)
    assert (model.truncated, inputs.ids.shape[1]) == (1, prompt + 7)
    assert inputs.labels[0, -1] != model.chat.end_id  # an end in mid-sentence is not learned
    assert (inputs.labels[0] != -100).sum() == 7
    with pytest.warns(UserWarning, match="cuts 1 of 1"), pytest.raises(ValueError, match="every label is masked"):
        llava(max_length=prompt).loss(image_tokens(1), model.encode(["tea"]))
    assert llava(max_length=prompt).generate(image_tokens(1), max_new_tokens=2) is not None


@pytest.mark.slow
def test_stages_lora_and_files(tmp_path: Path, folder: Path) -> None:
    first = Llava(str(folder), tune="projector")
    with torch.no_grad():
        first.projector.linear_1.weight.add_(1.0)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    state = {f"captioner.projector.{name}": value for name, value in first.projector.state_dict().items()}
    torch.save({"state_dict": state}, checkpoint)
    names = {"linear_1": "0", "linear_2": "2"}
    public = {
        f"model.mm_projector.{names[key.split('.')[1 + 1]]}.{key.split('.')[-1]}": v.half() for key, v in state.items()
    }
    torch.save(public, tmp_path / "mm_projector.bin")
    for path in (tmp_path / "run", checkpoint, tmp_path / "mm_projector.bin"):
        second = Llava(str(folder), projector=str(path), tune="lora", lora_rank=2, lora_dropout=0.0, dtype="bfloat16")
        torch.testing.assert_close(
            second.projector.linear_1.weight, first.projector.linear_1.weight, atol=1e-3, rtol=1e-3
        )
    trained = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("projector.") for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum(".lora_A" in name for name in trained) == 14  # seven matrices in two blocks
    tokens = torch.randn(2, 16, 64)
    second.loss(tokens, second.encode(["a cat", "tea"])).backward()
    assert all(p.grad is not None for p in trained.values())
    with pytest.raises(ValueError, match="no checkpoint there"):
        Llava(str(folder), projector=str(tmp_path / "nothing"))
    torch.save({"state_dict": {"captioner.projector.linear_1.weight": torch.zeros(2, 2)}}, checkpoint)
    with pytest.raises(ValueError, match=r"linear_1.weight': \(2, 2\)"):
        Llava(str(folder), projector=str(checkpoint))


@pytest.mark.slow
def test_a_directory_in_half_precision_keeps_rotary_frequencies_and_projector(folder: Path) -> None:
    plain, half = Llava(str(folder)), Llava(str(folder), dtype="bfloat16")
    assert {p.dtype for p in half.language_model.parameters()} == {torch.bfloat16}
    for name, buffer in half.language_model.named_buffers():
        assert torch.equal(buffer, plain.language_model.get_buffer(name)), name
    for name, parameter in half.projector.named_parameters():
        assert torch.equal(parameter, plain.projector.get_parameter(name)), name


def test_generation_settings_of_a_directory_change_no_caption(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "llava")
    settings = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(5, 2000))}
    (other / "generation_config.json").write_text(json.dumps(settings))
    tokens = torch.randn(3, 16, 64)
    texts = [Llava(str(path)).generate(tokens, num_beams=2, max_new_tokens=9) for path in (folder, other)]
    assert texts[0] == texts[1]


def test_prompt_and_answer_stay_within_the_positions_of_the_language_model() -> None:
    tokens = image_tokens(1)
    prompt = len(llava().chat.tokens([""], None)[0][0]) + 4
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": prompt + 3}  # learned
    model = llava(language_model=gpt2)
    assert model.max_length == prompt + 3
    with pytest.warns(UserWarning, match=f"max_length={prompt + 3} cuts 1 of 1"):
        assert model.loss(tokens, model.encode(["a cat and a dog and a cow"])).isfinite()
    bias = torch.zeros(2048)
    bias[0] = -1e4  # no text ends by itself
    head = model.language_model.lm_head.forward
    model.language_model.lm_head.forward = lambda x: head(x) + bias
    for beams in (1, 3):
        limited = model.generate(tokens, num_beams=beams, max_new_tokens=3)
        assert model.generate(tokens, num_beams=beams, max_new_tokens=67) == limited
    with pytest.raises(ValueError, match=rf"positions, and the language model has {prompt + 3} .*Shorten the prompt"):
        model.generate(tokens, model.encode_questions(["Which of the two animals, and why?" * 3]))


def test_what_a_checkpoint_replaces_and_what_no_tensor_shows(folder: Path) -> None:
    gone = {"projector": str(folder / "gone.bin")}
    with pytest.raises(ValueError, match="no checkpoint there"):
        llava(**gone)
    with restoring({}):
        llava(**gone)  # the checkpoint brings it
    assert llava(reader=PatchTokens(-1), lora_alpha=3.0).describe() == {
        "reader": "PatchTokens(layer=-1)",
        "tune": "full",
    }
    made = Llava(str(folder), tune="lora", lora_rank=2, lora_alpha=6.0)
    assert made.describe() == {"reader": "PatchTokens(layer=-2)", "tune": "lora", "lora_rank": 2, "lora_alpha": 6.0}


def test_recomputed_activations_give_the_same_gradients() -> None:
    plain, recomputed = llava(), llava(grad_checkpointing=True)
    for model in (plain, recomputed):
        model.loss(image_tokens(), model.encode(CAPTIONS, QUESTIONS)).backward()
    for (name, first), second in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=name)
    greedy = [model.generate(image_tokens(), num_beams=1, max_new_tokens=4) for model in (plain, recomputed)]
    assert greedy[0] == greedy[1]


def test_arguments_and_features_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    for settings, message in (
        ({"pretrained": str(folder)}, "either pretrained, or language_model"),
        ({"image_dim": None}, "needs image_dim"),
        ({"tune": "projector"}, "this one is new: tune: full"),
        ({"tune": "all"}, "give projector, lora or full"),
        ({"dtype": "bfloat16"}, "hold it in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            llava(**settings)
    with pytest.raises(ValueError, match=r"\(3, T, 8\): set image_dim"):
        llava().loss(torch.randn(3, 5, 9), llava().encode(CAPTIONS))
    with pytest.raises(ValueError, match=r"shape \(3, 8\), but this Llava reads patch tokens"):
        llava().generate(torch.randn(3, 8))
    AutoConfig.for_model(**LLAMA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama model, no llava"):
        Llava(str(tmp_path))
    with pytest.raises(ValueError, match="HFImageEncoder takes the image tower"):
        HFCLIPEncoder(str(folder))
    settings = AutoConfig.from_pretrained(folder)
    settings.vision_feature_select_strategy = {"default": "full", "full": "default"}[
        settings.vision_feature_select_strategy
    ]
    settings.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="all patch tokens and no class token"):
        Llava(str(tmp_path))
