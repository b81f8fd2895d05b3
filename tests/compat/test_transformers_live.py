"""``compat.transformers`` beside transformers itself: one tiny Qwen2-VL, the same snippet, the same tensors and ids.

Without torchvision transformers has no processor of videos; for those its model is given our tensors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_tiny

from mirada.compat import qwen_vl_utils
from mirada.compat import transformers as ours
from mirada.prompt.builtin import QWEN2_VL_TEMPLATE

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
theirs = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("live"), "qwen2_vl", seed=11)


@pytest.fixture(scope="module")
def reference(folder):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    class WithoutVideos(Qwen2VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    tokenizer = theirs.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    processor = WithoutVideos(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer=tokenizer, chat_template=QWEN2_VL_TEMPLATE
    )
    return processor, theirs.Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def mine(folder):
    return ours.AutoProcessor.from_pretrained(folder), ours.Qwen2VLForConditionalGeneration.from_pretrained(folder)


def chats() -> list:
    random = np.random.default_rng(5)
    a, b, c = (Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in ((60, 90), (200, 75), (333, 129)))
    one = [{"role": "user", "content": [{"type": "image", "image": a}, {"type": "text", "text": "What is  this?\n\n"}]}]
    two = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image", "image": b}, {"type": "text", "text": "and"}, {"type": "image", "image": c}],
        },
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Which is larger, 这个?"},
    ]
    return [one, two, [{"role": "user", "content": "Who are you?"}]]


@pytest.mark.parametrize("numbered", [False, True])
def test_the_snippet(reference, mine, numbered):
    """Texts, ids, masks, pixels, grids and the greedy answers of a batch of one picture, two pictures, and none."""
    made = []
    for processor, model in (reference, mine):
        texts = [
            processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, add_vision_id=numbered)
            for chat in chats()
        ]
        images, videos = qwen_vl_utils.process_vision_info(chats())
        inputs = processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt").to("cpu")
        generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        trimmed = [out_ids[len(in_ids) :] for in_ids, out_ids in zip(inputs.input_ids, generated, strict=True)]
        decoded = processor.batch_decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        made.append((texts, inputs, generated, decoded))
    (texts, inputs, generated, decoded), (our_texts, our_inputs, our_generated, our_decoded) = made
    assert our_texts == texts
    for name, value in our_inputs.items():
        assert value.dtype == inputs[name].dtype and torch.equal(value, inputs[name]), name
    assert set(inputs) - set(our_inputs) <= {"mm_token_type_ids"}
    assert torch.equal(our_generated, generated) and our_decoded == decoded


def test_their_inputs_in_our_model_and_ours_in_theirs(reference, mine):
    (their_processor, their_model), (processor, model) = reference, mine
    chat = chats()[1]
    images, _ = qwen_vl_utils.process_vision_info(chat)
    text = their_processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = their_processor(text=[text], images=images, return_tensors="pt")
    assert "mm_token_type_ids" in inputs
    ids = their_model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), ids)
    swapped = processor(text=[text], images=images, return_tensors="pt")
    kinds = inputs["mm_token_type_ids"]
    assert torch.equal(their_model.generate(**swapped, mm_token_type_ids=kinds, max_new_tokens=12, do_sample=False), ids)


def test_a_short_video(reference, mine):
    """Short enough that transformers 5 counts positions as the release did."""
    (_, their_model), (processor, model) = reference, mine
    frames = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (90, 140, 3), np.uint8)) for k in range(4)]
    chat = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    images, videos = qwen_vl_utils.process_vision_info(chat)
    inputs = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")
    kinds = 2 * (inputs.input_ids == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).long()
    ids = their_model.generate(**inputs, mm_token_type_ids=kinds, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), ids)


def test_decoding(reference, mine):
    their_processor, processor = reference[0], mine[0]
    random = np.random.default_rng(2)
    rows = random.integers(0, len(processor.tokenizer), (20, 12)).tolist()
    for skip in (False, True):
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        assert processor.batch_decode(rows, **options) == their_processor.batch_decode(rows, **options)
