"""The session against a second implementation, and everything that must not go wrong."""

import threading
from functools import lru_cache, partial

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from tests import reference, tiny
from tests.reference import Reference, close
from tests.tiny import always
from vlm_safeguard.errors import GuardError, GuardRuntimeError, ModelError
from vlm_safeguard.model.residual_stream import find_decoder

NEW = 5
SHORT = {"max_new_tokens": 3, "do_sample": False}
MODES = {
    "add-pass": {"mode": "add", "query": "pass"},
    "add-text": {"mode": "add", "query": "text"},
    "restore-text": {"mode": "restore", "reference": "text"},
    "restore-anchor": {"mode": "restore", "reference": "anchor"},
    "restore-refusal": {"mode": "restore", "reference": "text", "later": "refusal"},
    "erase": {"mode": "erase"},
}
DOSES = {
    "generated-1": {"positions": "generated", "tokens": 1},
    "generated-3": {"positions": "generated", "tokens": 3},
    "generated": {"positions": "generated", "tokens": None},
    "all-3": {"positions": "all", "tokens": 3},
    "all": {"positions": "all", "tokens": None},
}
GATES = {
    "text": [tiny.gate("text", 3, 1)],
    "vlm": [tiny.gate("vlm", 1, 3)],
    "both": [tiny.gate("text", 5), tiny.gate("vlm", 2)],
    "mean": [
        tiny.gate("text", 1, 5, reads_mean=True),
        tiny.gate("text", 5),
        tiny.gate("vlm", 2),
    ],
    "probe": [tiny.gate("text", 1, 5, reads_probe=True), tiny.gate("text", 5), tiny.gate("vlm", 2)],
    "per-layer": [
        tiny.gate("text", 4, 2, per_layer=True),
        tiny.gate("vlm", 4, 2, per_layer=True),
    ],
}


@lru_cache
def calibrated(model, gates: str, mode: str, dose: str):
    return reference.calibrated(model, tiny.PROMPTS, GATES[gates], **MODES[mode], **DOSES[dose])


generate = partial(tiny.generate, max_new_tokens=NEW)


def forward(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more)


# -- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("dose", ["generated", "all"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "restore-refusal"])
def test_forward_rows_get_what_they_get_alone(model, mode, gates, dose):
    guard, references = calibrated(model, gates, mode, dose)
    assert 0 < sum(r.fired for r in references) < len(references)
    with guard.attach(model) as session:
        for side in ("left", "right"):
            inputs = tiny.batch(tiny.PROMPTS, side)
            logits = forward(model, inputs).logits
            for row, reference in enumerate(references):
                kept = inputs["attention_mask"][row].bool()
                close(logits[row, kept], reference.logits([]))
            assert [d.fired for d in session.decisions] == [r.fired for r in references]


@pytest.mark.parametrize("dose", DOSES)
@pytest.mark.parametrize(
    ("gates", "mode"),
    [
        ("both", "restore-text"),
        ("vlm", "add-pass"),
        ("text", "add-text"),
        ("mean", "restore-text"),
        ("probe", "restore-text"),
        ("per-layer", "restore-text"),
        ("vlm", "erase"),
    ],
)
def test_generation_with_and_without_cache(model, mode, gates, dose):
    guard, references = calibrated(model, gates, mode, dose)
    expect_generation(model, guard, references)


@pytest.mark.parametrize("dose", ["generated-3", "all-3"])
@pytest.mark.parametrize("gates", ["vlm", "both", "per-layer"])
def test_what_refusals_have_there_is_restored_token_by_token(model, gates, dose):
    guard, references = calibrated(model, gates, "restore-refusal", dose)
    expect_generation(model, guard, references)


def expect_generation(model, guard, references):
    inputs = tiny.batch(tiny.PROMPTS)
    expected = [reference.greedy(NEW) for reference in references]
    with guard.attach(model):
        for use_cache in (True, False):
            tokens, logits = generate(model, inputs, use_cache=use_cache)
            close(logits, torch.stack([table for _, table in expected]))
            assert tokens.tolist() == [ids for ids, _ in expected]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("gates", "mode"),
    [("vlm", "restore-text"), ("both", "restore-text"), ("both", "restore-refusal")],
)
def test_manual_decoding_with_a_cache(model, gates, mode, side):
    guard, references = calibrated(model, gates, mode, "generated-3")
    inputs = tiny.batch(tiny.PROMPTS, side)
    mask, rows = inputs["attention_mask"], torch.arange(len(tiny.PROMPTS))
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with guard.attach(model):
        out = forward(model, inputs, position_ids=places, past_key_values=DynamicCache())
        tables = [out.logits[rows, last]]
        for step in range(1, NEW):
            token = tables[-1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
            out = forward(
                model,
                {"input_ids": token, "attention_mask": mask},
                position_ids=places[rows, last][:, None] + step,
                past_key_values=out.past_key_values,
            )
            tables.append(out.logits[:, -1])
    close(torch.stack(tables, 1), torch.stack([r.greedy(NEW)[1] for r in references]))


def test_chunked_prefill_equals_one_pass(model):
    guard, _ = calibrated(model, "both", "restore-text", "generated-3")
    inputs = tiny.batch([tiny.words(seed, 5 + seed) for seed in range(4)])  # text: HF's limit
    with guard.attach(model):
        whole = generate(model, inputs)
        chunked = generate(model, inputs, prefill_chunk_size=3)
    close(chunked[1], whole[1])


def test_a_prefix_cache_filled_before_equals_one_pass(model):
    guard, _ = calibrated(model, "both", "restore-text", "generated-3")
    for seed in range(4):
        inputs = tiny.batch([tiny.words(seed, 5 + seed)])
        cache = DynamicCache()
        forward(model, {"input_ids": inputs["input_ids"][:, :4]}, past_key_values=cache)
        with guard.attach(model):
            close(generate(model, inputs, past_key_values=cache)[1], generate(model, inputs)[1])


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["beams", "returned"],
)
def test_beams_equal_runs_of_single_prompts(model, options):
    guard, references = calibrated(model, "both", "restore-text", "generated-3")
    options = options | {"max_new_tokens": NEW, "do_sample": False}
    inputs, count = tiny.batch(tiny.PROMPTS), options.get("num_return_sequences", 1)
    with guard.attach(model) as session:
        batch = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        fired = [r.fired for r in references for _ in range(count)]
        assert [d.fired for d in session.decisions] == fired  # one for each returned sequence
        assert [bool(row.changed) for row in session.attestation.rows] == fired
        for row, prompt in enumerate(tiny.PROMPTS):
            alone = model.generate(**tiny.batch([prompt]), **options)[:, len(prompt) :]
            assert batch[row * count : (row + 1) * count].tolist() == alone.tolist()


def test_sampled_sequences_each_carry_the_gate_of_their_prompt(model):
    guard, references = calibrated(model, "both", "restore-text", "generated-3")
    with guard.attach(model) as session:
        generate(model, tiny.batch(tiny.PROMPTS), do_sample=True, num_return_sequences=2)
        fired = [d.fired for d in session.decisions]
    assert fired == [r.fired for r in references for _ in range(2)]


def test_another_architecture():
    model = tiny.onevision()
    made = tiny.guard(model, [tiny.gate("text", 3), tiny.gate("vlm", 1)], tokens=3)
    prompts = [tiny.words(seed, 4 + seed) for seed in range(4)]
    with made.attach(model) as session:
        _, logits = generate(model, tiny.batch(prompts))
        assert len({d.fired for d in session.decisions}) == 2
        for row, prompt in enumerate(prompts):
            close(logits[row], Reference(model, made, prompt).greedy(NEW)[1])


# -- the text-only pass ------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_witness_is_the_bare_language_model(model, side):
    made = tiny.guard(model, [tiny.gate("text", *range(tiny.LAYERS))])
    decoder = find_decoder(model)
    expected = []
    for prompt in tiny.PROMPTS:
        states = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out, to=states: to.append(out[0, -1]))
            for layer in decoder.layers
        ]
        with torch.no_grad():
            decoder.module(input_ids=torch.tensor([tiny.without_pictures(prompt)]))
        for hook in hooks:
            hook.remove()
        expected.append((torch.stack(states) * made.tensors["gate.0"]).sum(1))
    with made.attach(model) as session:
        forward(model, tiny.batch(tiny.PROMPTS, side))
        scores = torch.tensor([d.parts["text.0"] for d in session.decisions])
    close(scores, torch.stack(expected))


# -- nothing leaks, nothing stays --------------------------------------------------------------


def traces(model):
    """Everything a guard could leave behind on a model."""
    return [
        (
            name,
            sorted(module.__dict__),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


class _RaisesOn(LogitsProcessor):
    def __init__(self, call):
        self.calls, self.call = 0, call

    def __call__(self, _, scores):
        self.calls += 1
        if self.calls == self.call:
            raise RuntimeError("on purpose")
        return scores


def _raise_in_layer(model):
    handle = find_decoder(model).layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            forward(model, tiny.batch(tiny.PROMPTS), past_key_values=DynamicCache())
    finally:
        handle.remove()


def _raise_in_generate(model):
    with pytest.raises(RuntimeError, match="on purpose"):
        generate(
            model,
            tiny.batch(tiny.PROMPTS),
            logits_processor=LogitsProcessorList([_RaisesOn(3)]),
        )


@pytest.mark.parametrize("accident", [_raise_in_layer, _raise_in_generate])
def test_an_exception_leaves_no_state(model, accident):
    guard, references = calibrated(model, "both", "restore-text", "generated-3")
    before = traces(model)
    with guard.attach(model) as session:
        accident(model)
        assert session._request is None
        assert session._pass is None
        for row in (1, 0, 3):  # a request, then others with other gates
            logits = forward(model, tiny.batch([tiny.PROMPTS[row]])).logits
            close(logits[0], references[row].logits([]))
        with pytest.raises(GuardRuntimeError):
            model.model(**tiny.batch(tiny.PROMPTS[:1]))  # around the guarded forward call
    assert traces(model) == before


def test_the_model_is_as_before_and_bit_identical(model):
    inputs, before = tiny.batch(tiny.PROMPTS), traces(model)
    plain = generate(model, inputs)
    for threshold in (1e9, -1e9):
        with always(model, threshold).attach(model):
            guarded = generate(model, inputs)
        assert torch.equal(guarded[1], plain[1]) == (threshold > 0)
        assert traces(model) == before
        assert torch.equal(generate(model, inputs)[1], plain[1])


def test_a_generate_of_the_users_own_is_kept(model):
    own = model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.generate
    try:
        with always(model).attach(model) as session:
            generate(model, tiny.batch(tiny.PROMPTS))
            assert all(d.fired for d in session.decisions)
        assert model.generate is mine
    finally:
        del model.generate


def test_streaming_from_a_thread_is_guarded_to_its_end(model):
    class Slow:
        def __init__(self):
            self.tokens, self.started, self.go = [], threading.Event(), threading.Event()

        def put(self, value):
            self.tokens.append(value)
            self.started.set()
            self.go.wait(10)

        def end(self):
            self.tokens.append(None)

    guard, references = calibrated(model, "both", "restore-text", "generated")
    inputs, streamer = tiny.batch(tiny.PROMPTS[:1]), Slow()
    with guard.attach(model):
        options = {"max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=inputs | options)
        thread.start()
        streamer.started.wait(10)
        threading.Timer(0.05, streamer.go.set).start()
    # Leaving the `with` has waited: the guard did not go away under a running generation.
    thread.join(10)
    assert [int(t) for t in streamer.tokens[1:-1]] == references[0].greedy(NEW)[0]


# -- fail closed -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["text", "vlm"])
def test_removed_hooks_withhold_the_output(model, source):
    made = tiny.guard(model, [tiny.gate(source, 2)])
    with made.attach(model), pytest.raises(GuardRuntimeError, match=r"hooks|did not reach"):
        forward(model, tiny.batch(tiny.PROMPTS))
        find_decoder(model).layers[2]._forward_hooks.clear()
        forward(model, tiny.batch(tiny.PROMPTS))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("source", ["text", "vlm"])
def test_nan_and_inf_block_the_request(model, source, per_layer, value):
    """In one coordinate of the state that the last gate layer reads: the score itself is that."""

    def poison(_, __, output):
        output[..., 0] = value

    made = tiny.guard(model, [tiny.gate(source, 2, 4, per_layer=per_layer)])
    handle = find_decoder(model).layers[4].mlp.register_forward_hook(poison)
    try:
        with made.attach(model), pytest.raises(GuardRuntimeError, match="NaN or Inf"):
            forward(model, tiny.batch(tiny.PROMPTS))
    finally:
        handle.remove()


def _embeds_only(model, inputs):
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    forward(model, {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]})


def _embeds_generate(model, inputs):
    model.generate(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


def _assistant(model, inputs):
    model.generate(**inputs, assistant_model=model)


def _lookup(model, inputs):
    model.generate(**inputs, prompt_lookup_num_tokens=2)


def _classifier_free(model, inputs):
    model.generate(**inputs, guidance_scale=2.0, **SHORT)


def _filled():
    cache = DynamicCache()
    for layer in range(tiny.LAYERS):
        cache.update(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), layer)
    return cache


def _foreign_cache(model, inputs):
    forward(model, {"input_ids": inputs["input_ids"][:, -1:]}, past_key_values=_filled())


def _foreign_cache_after_a_request(model, inputs):
    done = forward(model, inputs, past_key_values=DynamicCache())
    other = DynamicCache()
    for layer, held in enumerate(done.past_key_values.layers):
        other.update(held.keys, held.values, layer)
    forward(model, {"input_ids": inputs["input_ids"][:, -1:]}, past_key_values=other)


def _positional_cache(model, inputs):
    with torch.no_grad():
        model(inputs["input_ids"][:, -1:], None, None, None, _filled())


def _cache_of_the_whole_prompt(model, inputs):
    ids = inputs["input_ids"][:, -6:]
    cache = _filled()
    model.generate(input_ids=ids, attention_mask=ids * 0 + 1, past_key_values=cache, **SHORT)


def _second_turn_on_the_cache(model, inputs):
    done = forward(model, inputs, past_key_values=DynamicCache())
    turn = torch.tensor([tiny.words(9, 4)])
    forward(model, {"input_ids": turn}, past_key_values=done.past_key_values)


def _empty_prompt(model, inputs):
    forward(model, {"input_ids": torch.zeros(1, 0, dtype=torch.long)})


def _no_token_attended(model, inputs):
    forward(model, inputs | {"attention_mask": inputs["attention_mask"] * 0})


def _picture_without_text(model, inputs):
    forward(model, tiny.batch([tiny.pictured([])]))


def _nothing(model, inputs):
    model.generate(max_new_tokens=2)


def _right_padding(model, inputs):
    model.generate(**tiny.batch(tiny.PROMPTS, "right"))


def _mask_of_another_shape(model, inputs):
    forward(model, inputs | {"attention_mask": torch.ones(1, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    "misuse",
    [
        _embeds_only,
        _embeds_generate,
        _assistant,
        _lookup,
        _classifier_free,
        _foreign_cache,
        _foreign_cache_after_a_request,
        _positional_cache,
        _cache_of_the_whole_prompt,
        _second_turn_on_the_cache,
        _empty_prompt,
        _no_token_attended,
        _picture_without_text,
        _nothing,
        _right_padding,
        _mask_of_another_shape,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_what_cannot_be_guarded_is_refused(model, misuse):
    before = traces(model)
    with always(model).attach(model), pytest.raises(GuardRuntimeError):
        misuse(model, tiny.batch([tiny.PROMPTS[0]]))
    assert traces(model) == before


@pytest.mark.parametrize("part", ["chunks", "prefix cache"])
def test_prompts_in_parts_are_refused_where_they_would_differ(model, part):
    ids = torch.tensor([tiny.words(0, 10)])
    options = {"prefill_chunk_size": 3} if part == "chunks" else {"past_key_values": _filled()}
    made = always(model, positions="all")
    with made.attach(model), pytest.raises(GuardRuntimeError):
        model.generate(input_ids=ids, attention_mask=ids * 0 + 1, **options, **SHORT)


def test_a_second_guard_is_refused_and_the_first_stays(model):
    made = always(model)
    with made.attach(model) as session:
        with pytest.raises(GuardError, match="already"), made.attach(model):
            pass
        forward(model, tiny.batch(tiny.PROMPTS))
        assert all(d.fired for d in session.decisions)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_refused(how):
    model = tiny.llava()
    made = always(model)
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises((GuardError, ModelError)), made.attach(model):
        pass


def test_layers_replaced_after_attaching_are_noticed():
    model = tiny.llava()
    made = always(model)
    decoder = find_decoder(model)
    with made.attach(model), pytest.raises(GuardRuntimeError):
        decoder.module.layers = nn.ModuleList(tiny.llava().model.language_model.layers)
        forward(model, tiny.batch(tiny.PROMPTS))


def test_decisions_of_a_failed_request_are_not_the_last_ones(model):
    with always(model).attach(model) as session:
        forward(model, tiny.batch(tiny.PROMPTS))
        assert len(session.decisions) == len(tiny.PROMPTS)
        with pytest.raises(GuardRuntimeError):
            _empty_prompt(model, None)
        assert session.decisions == []


@pytest.mark.parametrize(
    ("reference", "threshold", "runs"),
    [("text", 1e9, 1), ("text", -1e9, 2), ("anchor", -1e9, 1)],
)
def test_the_text_pass_ends_once_it_is_decided(model, reference, threshold, runs):
    """The last steered layer runs for the request itself, and for its text only where coordinates
    of an open row are wanted from it."""
    guard = always(model, threshold, mode="restore", reference=reference)
    last = max(guard.config.steering.layers)
    assert last > max(guard.config.gates[0].layers)
    calls = []
    handle = find_decoder(model).layers[last].register_forward_hook(lambda *_: calls.append(1))
    try:
        with guard.attach(model):
            forward(model, tiny.batch(tiny.PROMPTS))
    finally:
        handle.remove()
    assert len(calls) == runs
