"""The text-only prompt of padded batches of token ids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from tests import families, tiny
from vlm_safeguard.artifact.config import ImageMarkup
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.text_only import (
    find_markup,
    positions_of,
    text_columns,
    text_only,
)

IMG, START, END = 90, 91, 92
MARKUPS = {
    "bare": ImageMarkup(token_ids=[IMG]),
    "after": ImageMarkup(token_ids=[IMG], after=[END]),
    "before": ImageMarkup(token_ids=[IMG], before=[START]),
    "both": ImageMarkup(token_ids=[IMG], before=[START], after=[END]),
    "longer": ImageMarkup(token_ids=[IMG, IMG + 5], before=[START, 7], after=[8, END]),
}
WORDS = st.lists(st.integers(1, 80), max_size=5)


def picture(markup, patches=3):
    inside = [markup.token_ids[i % len(markup.token_ids)] for i in range(patches)]
    return [*markup.before, *inside, *markup.after]


def strip(markup, ids):
    return [ids[place] for place in markup.kept(ids)]


@pytest.mark.parametrize("markup", MARKUPS.values(), ids=MARKUPS)
@given(parts=st.lists(WORDS, min_size=1, max_size=5), patches=st.integers(1, 4))
def test_taking_pictures_out_gives_the_text_back(markup, parts, patches):
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [*picture(markup, patches), *part]
    assert strip(markup, ids) == [token for part in parts for token in part]


@pytest.mark.parametrize("markup", MARKUPS.values(), ids=MARKUPS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_pictures_side_by_side_at_either_end(markup, count):
    row = picture(markup) * count
    assert strip(markup, row) == []
    assert strip(markup, [*row, 1, 2]) == [1, 2]
    assert strip(markup, [1, 2, *row]) == [1, 2]


def test_only_one_wrapper_goes_with_a_picture():
    markup = MARKUPS["both"]
    assert strip(markup, [1, START, START, IMG, END, END, 2]) == [1, START, END, 2]
    assert strip(markup, [1, IMG, 2, END]) == [1, 2, END]  # no wrapper beside it


def test_a_wrapper_must_touch_its_picture():
    """The newline in front of one picture's own wrapper is text of its neighbour."""
    markup = ImageMarkup(token_ids=[IMG], before=[5], after=[6])
    assert strip(markup, [1, 5, 5, IMG, 6, IMG, 2]) == [1, 5, 2]


def test_the_far_ends_of_a_wrapper_may_have_melted_with_the_text():
    """What stands next to the picture goes; 70 and 71 hold START and END and some of the text."""
    assert strip(MARKUPS["longer"], [1, 70, 7, IMG, 8, 71, 2]) == [1, 70, 71, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_padded_on_either_side(side):
    inputs = tiny.batch(tiny.PROMPTS, side)
    markup = ImageMarkup(token_ids=[tiny.IMAGE], after=[tiny.NEWLINE])
    columns = text_columns(inputs["input_ids"], inputs["attention_mask"], markup)
    ids, mask = text_only(inputs["input_ids"], columns, tiny.PAD)
    expected = tiny.batch([tiny.without_pictures(prompt) for prompt in tiny.PROMPTS])
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])


def test_a_row_of_pictures_only_has_no_columns():
    inputs = tiny.batch([tiny.pictured([]), [5, 6]])
    markup = ImageMarkup(token_ids=[tiny.IMAGE], after=[tiny.NEWLINE])
    columns = text_columns(inputs["input_ids"], inputs["attention_mask"], markup)
    assert columns.sum(1).tolist() == [0, 2]


def test_positions_count_attended_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 1, 2, 2]]


@pytest.mark.parametrize("by_template", [False, True])
def test_special_tokens_are_those_of_transformers_own_way(by_template):
    """LLaVA-1.5's template leaves the first token to the tokenizer, others write it themselves."""
    loaded = families.llava()
    tokenizer, template = loaded.processor.tokenizer, loaded.processor.chat_template
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", families.BOS)]
    )
    loaded.processor.chat_template = ("<s>" if by_template else "") + template
    photo = families.photo(1)
    for image in (None, photo):
        ours = encode(loaded, ["How far is it?"], [image])["input_ids"]
        content = [{"type": "text", "text": "How far is it?"}]
        content = content if image is None else [{"type": "image", "image": image}, *content]
        theirs = loaded.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(ours, theirs["input_ids"])
        assert (ours == families.BOS).sum() == 1 and ours[0, 0] == families.BOS
    markup = find_markup(loaded)
    row = encode(loaded, ["How far is it?"], [photo])["input_ids"][0].tolist()
    plain = encode(loaded, ["How far is it?"], [None])["input_ids"][0].tolist()
    assert [row[i] for i in markup.kept(row)] == plain
