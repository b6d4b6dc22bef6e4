"""Our numbers and those of DeepSeek's code, for every published layout: within 1e-5 in float32."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_janus
from mlx_janus.inference.text_generation import embed_prompt
from mlx_janus.models.siglip import SiglipVisionTower
from mlx_janus.processing.images import open_image, preprocess, to_image
from mlx_janus.processing.prompts import Turn
from tests.support.golden import assert_close, golden, golden_facts, nchw, nhwc

pytestmark = pytest.mark.check
Janus = mlx_janus.JanusPipeline


def picture(folder: str, index: int) -> Image.Image:
    return Image.fromarray(np.array(golden(folder)[f"image.{index}.rgb"]))


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 6])
def test_preprocessing(janus: Janus, folder: str, index: int) -> None:
    """Wide, tall, small and square; narrow images depend on Pillow (processing/test_images.py)."""
    pixels = preprocess(open_image(picture(folder, index)), janus.config.image)
    assert_close(pixels.transpose(2, 0, 1), golden(folder)[f"image.{index}.pixel_values"])


def test_vision_encoder(janus: Janus, folder: str) -> None:
    want = golden(folder)
    tower = janus.model.vision_model.vision_tower
    pixels = nhwc(want["vision.pixel_values"])
    assert_close(tower.embed(pixels), want["vision.embed"])
    assert_close(tower.blocks[0](tower.embed(pixels)), want["vision.block0"])
    assert_close(janus.model.vision_model(pixels), want["vision.out"])
    assert_close(janus.model.understand(pixels), want["aligner.out"])


def test_a_second_normalization_of_the_encoder(pro: Janus) -> None:
    """DeepSeek's encoder applies ``pixel_mean`` and ``pixel_std`` to its input, if it has them."""
    want = golden("deepseek-pro-bin")
    mean = (0.1, -0.2, 0.3)
    std = (0.5, 0.7, 0.9)
    tower = pro.model.vision_model
    other = SiglipVisionTower(replace(pro.config.understanding, pixel_mean=mean, pixel_std=std))
    assert other.parameters().keys() == tower.parameters().keys()
    other.update(tower.parameters())
    pixels = nhwc(want["vision.pixel_values"])
    assert_close(other(pixels * mx.array(std) + mx.array(mean)), want["vision.out"])


def test_language_model(janus: Janus, folder: str) -> None:
    want, model = golden(folder), janus.model
    embeddings = model.embed_text(want["text.input_ids"])
    assert_close(embeddings, want["text.embeds"])
    layer = model.language_model.model.layers[0]
    assert_close(layer(embeddings, mask="causal"), want["text.layer0"])
    hidden = model.hidden_states(embeddings)
    assert_close(hidden, want["text.hidden"])
    assert_close(model.text_logits(hidden[:, -4:]), want["text.logits_last4"])


def test_image_token_embedding_and_head(janus: Janus, folder: str) -> None:
    want, model = golden(folder), janus.model
    ids = want["gen_embeds.ids"]
    assert_close(model.gen_embed(ids), want["gen_embeds.embed"])
    assert_close(model.embed_image_tokens(ids[None])[0], want["gen_embeds.out"])
    assert_close(model.image_logits(want["gen_head.in"]), want["gen_head.out"])


def test_codec_decodes(janus: Janus, folder: str) -> None:
    want, model = golden(folder), janus.model
    codec = model.gen_vision_model
    quantized = codec.quantize.look_up(want["vq.codes"]).reshape(2, 4, 4, -1)
    assert_close(nchw(quantized), want["vq.quant"])
    x = codec.post_quant_conv(quantized)
    assert_close(nchw(x), want["vq.post_quant"])
    x = codec.decoder.conv_in(x)
    assert_close(nchw(x), want["vq.dec_conv_in"])
    for block in codec.decoder.mid:
        x = block(x)
    assert_close(nchw(x), want["vq.dec_mid"])
    pixels = model.decode_image_tokens(want["vq.codes"])
    assert_close(nchw(pixels), want["vq.dec"])
    assert_close(
        nchw(model.decode_image_tokens(want["vq.codes_rect"], (4, 6))), want["vq.dec_rect"]
    )
    for row, expected in zip(pixels, want["vq.dec_u8"], strict=True):
        assert_same_bytes(to_image(np.array(row)), expected, row)


def test_codec_encodes(janus: Janus, folder: str) -> None:
    want, model = golden(folder), janus.model
    codec, pixels = model.gen_vision_model, nhwc(want["vq.enc_in"])
    z = codec.encoder(pixels)
    assert_close(nchw(z), want["vq.enc_out"])
    z = codec.quant_conv(z)
    assert_close(nchw(z), want["vq.enc_quant_conv"])
    ids = model.encode_image_tokens(pixels)
    assert ids.tolist() == want["vq.enc_indices"].tolist()
    assert_close(nchw(codec.quantize.look_up(ids).reshape(2, 4, 4, -1)), want["vq.enc_quant"])
    assert_close(nchw(model.decode_image_tokens(ids)), want["vq.recon"])


def test_prompt_with_a_picture(janus: Janus, folder: str) -> None:
    want, model = golden(folder), janus.model
    ids = janus.prompts.answering([Turn("user", "What is in this image?", 1)])
    assert [ids] == want["und.input_ids"].tolist()
    pixels = preprocess(open_image(picture(folder, 0)), janus.config.image)
    assert_close(pixels.transpose(2, 0, 1), want["und.pixel_values"][0, 0])
    embeddings = embed_prompt(janus, ids, janus.encode([pixels]))
    assert_close(embeddings[None], want["und.inputs_embeds"])
    layer = model.language_model.model.layers[0]
    assert_close(layer(embeddings[None], mask="causal"), want["und.layer0"])
    hidden = model.hidden_states(embeddings[None])
    assert_close(hidden, want["und.hidden"])
    assert_close(model.text_logits(hidden[:, -4:]), want["und.logits_last4"])


def test_greedy_answer(janus: Janus, folder: str) -> None:
    want = golden(folder)
    result = janus.generate_text("What is in this image?", picture(folder, 0), max_tokens=16)
    assert list(result.tokens) == want["und.greedy_tokens"][0].tolist()
    assert result.text == json.loads(golden_facts(folder)["und.greedy_text"])[0].lstrip()
    assert result.prompt_tokens == want["und.input_ids"].shape[1]


def test_greedy_logits(janus: Janus, folder: str) -> None:
    """Logits of the whole answer in one pass, which the cached loop must have seen."""
    want, model = golden(folder), janus.model
    pixels = preprocess(open_image(picture(folder, 0)), janus.config.image)
    prompt = embed_prompt(janus, want["und.input_ids"][0].tolist(), janus.encode([pixels]))
    answer = model.embed_text(want["und.greedy_tokens"][:, :-1])[0]
    hidden = model.hidden_states(mx.concatenate([prompt, answer])[None])
    assert_close(model.text_logits(hidden[:, len(prompt) - 1 :]), want["und.greedy_logits"])


def test_several_pictures(janus: Janus, folder: str) -> None:
    """The reference's left-padded batch of two conversations, here one by one without padding."""
    want, texts = golden(folder), json.loads(golden_facts(folder)["batch.greedy_text"])
    asked = [("Which image is brighter?", 2), ("What is in this image?", 1)]
    for row, (question, count) in enumerate(asked):
        mask = np.array(want["batch.attention_mask"][row]).astype(bool)
        ids = np.array(want["batch.input_ids"][row])[mask].tolist()
        turns = [Turn("user", question, count)]
        assert janus.prompts.answering(turns) == ids
        pixels = [
            np.array(want["batch.pixel_values"][row, i]).transpose(1, 2, 0) for i in range(count)
        ]
        embeddings = embed_prompt(janus, ids, janus.encode(pixels))
        assert_close(embeddings, np.array(want["batch.inputs_embeds"][row])[mask])
        expected = want["batch.greedy_tokens"][row]
        answer = janus.model.embed_text(expected[None, :-1])[0]
        hidden = janus.model.hidden_states(mx.concatenate([embeddings, answer])[None])
        logits = janus.model.text_logits(hidden[:, len(ids) - 1 :])[0]
        assert_close(logits, want["batch.greedy_logits"][row])
        assert mx.argmax(logits, axis=-1).tolist() == expected.tolist()
        assert janus.prompts.decode(expected.tolist()) == texts[row]


def test_drawing_prompt(janus: Janus, folder: str) -> None:
    want = golden(folder)
    ids = janus.prompts.drawing(drawing_text(folder))
    assert ids == want["gen.input_ids"].tolist()
    assert [ids, janus.prompts.unconditional(ids)] == want["gen.tokens"].tolist()
    assert janus.prompts.render_drawing(drawing_text(folder)) == golden_facts(folder)["gen.prompt"]
    assert_close(janus.model.embed_text(want["gen.tokens"]), want["gen.inputs_embeds"])


def test_drawing_logits(janus: Janus, folder: str) -> None:
    """Both rows of every position, teacher-forced through the cache, and their guided mixture."""
    want, model = golden(folder), janus.model
    cache = model.make_cache()
    hidden = model.hidden_states(model.embed_text(want["gen.tokens"]), cache)[:, -1:]
    for position, token in enumerate(want["gen.greedy_tokens"].tolist()):
        assert_close(hidden[:, 0], want["gen.hidden"][position])
        logits = model.image_logits(hidden[:, 0])
        assert_close(logits[0], want["gen.logits_cond"][position])
        assert_close(logits[1], want["gen.logits_uncond"][position])
        assert_close(logits[1] + 5 * (logits[0] - logits[1]), want["gen.logits_cfg"][position])
        hidden = model.hidden_states(model.embed_image_tokens(mx.array([[token], [token]])), cache)


def test_greedy_picture(janus: Janus, folder: str) -> None:
    want = golden(folder)
    drawn = janus.generate_images(drawing_text(folder), temperature=0)[0]
    assert drawn.tokens.tolist() == want["gen.greedy_tokens"].tolist()
    pixels = janus.model.decode_image_tokens(mx.array(drawn.tokens)[None])
    assert_close(nchw(pixels), want["gen.image"])
    assert_same_bytes(drawn.image, want["gen.image_u8"][0], pixels[0])


def drawing_text(folder: str) -> str:
    return golden_facts(folder)["gen.prompt"].split(": ", 1)[1].split("\n\n")[0]


def assert_same_bytes(image: Image.Image, expected: mx.array, pixels: mx.array) -> None:
    """Equal except where a value lies on the edge between two bytes: rounding decides those."""
    ours, theirs = np.array(image).astype(int), np.array(expected).astype(int)
    value = (np.array(pixels).astype(np.float64) + 1) / 2 * 255
    edge = (np.abs(value - np.round(value)) < 1e-3) & (value > -1) & (value < 256)
    assert np.abs(ours - theirs)[~edge].max(initial=0) == 0
    assert np.abs(ours - theirs).max() <= 1
    assert edge.mean() < 0.02


@pytest.mark.parametrize("eps", ["vision", "language", "codec"])
def test_the_tolerance_sees_a_wrong_eps(pro: Janus, eps: str) -> None:
    """The bound is worth something only if the commonest mistake exceeds it."""
    from tests.support.golden import TOLERANCE, rms_error

    want, model = golden("deepseek-pro-bin"), pro.model
    root, run, name = {
        "vision": (
            model.vision_model,
            lambda: model.vision_model(nhwc(want["vision.pixel_values"])),
            "vision.out",
        ),
        "language": (
            model.language_model,
            lambda: model.hidden_states(model.embed_text(want["text.input_ids"])),
            "text.hidden",
        ),
        "codec": (
            model.gen_vision_model,
            lambda: nchw(model.decode_image_tokens(want["vq.codes"])),
            "vq.dec",
        ),
    }[eps]
    norms = [module for _, module in root.named_modules() if hasattr(module, "eps")]
    for norm in norms:
        norm.eps = 1e-5
    try:
        assert rms_error(run(), want[name]) > TOLERANCE
    finally:
        for norm in norms:
            norm.eps = 1e-6
