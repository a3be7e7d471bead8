"""The embedded models do what their cards say. (The cards' whole table: scripts/eval_tiny.py.)"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import eval_dspark
import eval_tiny

from ds4jax.chat import template as chat
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.drafter import open_drafter
from ds4jax.io.load import load, load_drafter
from ds4jax.io.recipes import RECIPES, choose, parse_types
from ds4jax.io.tokenizer import Special, Tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import dspark, weights
from ds4jax.model.compute import Compute
from ds4jax.model.tensors import drafter_table, mtp_table, tensor_table
from ds4jax.model.transformer import decode_step
from ds4jax.paths import EMBEDDED, MODELS, embedded_drafter, embedded_model
from ds4jax.settings import Settings

RIGHT = {"tiny": 0.90, "tiny_q2": 0.75}  # the part of the questions that must be answered right
SIZE = {"tiny": 24e6, "tiny_q2": 10e6}


@pytest.fixture(scope="module", params=EMBEDDED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    weights, checkpoint = load(embedded_model(name))
    return eval_tiny.Model(weights, checkpoint.cfg, Tokenizer.from_metadata(checkpoint.file.metadata))


def ask(model, items, think):
    prompts = [chat.render_ids(model.tok, item.messages, think=think, tools=item.tools) for item in items]
    return eval_tiny.answer(model, prompts, len(prompts))


def said(model, ids):
    close = model.tok.special(Special.THINK_CLOSE)
    return model.tok.decode(ids[ids.index(close) + 1 :] if close in ids else ids)


# Each run takes a minute or two, so the larger model is asked only with the slow tests.
SMALLER_MODEL = pytest.mark.parametrize(
    "name", ["tiny_q2", pytest.param("tiny", marks=pytest.mark.slow)], indirect=True, scope="module"
)


@SMALLER_MODEL
def test_questions_that_training_saw_in_other_words(model, name):
    items = eval_tiny.questions()
    right = [item.right(said(model, ids)) for item, ids in zip(items, ask(model, items, "off"), strict=True)]
    assert len(right) == 40 and sum(right) >= RIGHT[name] * len(right)


@pytest.mark.slow
@SMALLER_MODEL
def test_tool_calls_with_thinking(model):
    items = eval_tiny.tool_requests()[::10]
    answers = ask(model, items, "on")
    right = [item.right(said(model, ids)) for item, ids in zip(items, answers, strict=True)]
    assert len(right) == 20 and sum(right) >= 0.95 * len(right)
    assert all(eval_tiny.thinks(ids, model.tok) for ids in answers)


@SMALLER_MODEL
def test_the_mtp_head_agrees_with_the_model(model):
    texts = eval_tiny._held_out("heldout")
    pieces = [d for t in texts for d in eval_tiny.tiny_data.text_documents(t["text"], model.tok) if len(d[0]) > 500]
    _, agreement = eval_tiny.observe(model, pieces[:: len(pieces) // 8][:8], 8)
    assert agreement > 0.55  # 64 % over all of the text


@pytest.mark.slow
def test_an_answer_through_the_kernels():
    """Interpreted, token by token: the answer that XLA gives, and at each position nearly its logits.

    The kernels' queries are float16, which moves values of this undamped model over the middle between two codes.
    """
    weights, checkpoint = load(embedded_model("tiny_q2"))
    model = eval_tiny.Model(weights, checkpoint.cfg, Tokenizer.from_metadata(checkpoint.file.metadata))
    (question, *_) = eval_tiny.questions()
    prompt = chat.render_ids(model.tok, question.messages, think="off")
    (answer,) = eval_tiny.answer(model, [prompt], 1)
    assert question.right(model.tok.decode(answer))

    found = {}
    for kernels in ("xla", "pallas_interpret"):
        compute, out = Compute("official", kernels=kernels), []
        cache = kv.empty(model.cfg, compute.numerics, compute.dtype, 1, 256)
        step = functools.partial(decode_step, cfg=model.cfg, compute=compute)
        for token in [*prompt, *answer]:
            logits, cache = step(weights, cache, jnp.array([token]), jnp.array([True]))
            out.append(np.asarray(logits[0]))
        found[kernels] = np.stack(out)
    greedy = found["pallas_interpret"].argmax(axis=1)[len(prompt) - 1 :].tolist()
    assert greedy == [*answer, model.tok.eos_id]
    error = np.linalg.norm(found["pallas_interpret"] - found["xla"], axis=1) / np.linalg.norm(found["xla"], axis=1)
    assert np.median(error) < 2e-3 and error.max() < 1e-2


def test_types_and_sizes(name):
    checkpoint = open_checkpoint(embedded_model(name))
    table = tensor_table(checkpoint.cfg) + mtp_table(checkpoint.cfg, "mtp")
    kinds = {
        "tiny": ("q4", ["ffn.experts=Q8_0", "mtp.ffn.experts=Q8_0"]),
        "tiny_q2": ("q2", eval_tiny.Q2_TYPES),
    }
    recipe, types = kinds[name]
    assert checkpoint.types == choose(table, RECIPES[recipe], parse_types(types))
    assert (Type.IQ2_XXS in checkpoint.types.values()) == (name == "tiny_q2")
    assert embedded_model(name).stat().st_size <= SIZE[name]
    assert {0, 4, 128} == set(checkpoint.cfg.compress_ratios) and checkpoint.cfg.n_mtp == 1


def test_cards_and_configs(name):
    card = (MODELS / f"{name}.md").read_text(encoding="utf-8")
    assert "scripts/eval_tiny.py" in card and all(licence in card for licence in ("PSF-2.0", "Apache-2.0", "BSD-3"))
    assert f"{embedded_model(name).stat().st_size / 1e6:.2f} MB" in card
    assert Settings.load(name).model == name


# ---- the drafter -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drafter():
    """The drafter's open file, and the config of ``tiny`` with it."""
    checkpoint = open_checkpoint(embedded_model("tiny"))
    opened = open_drafter(embedded_drafter(), checkpoint)
    return opened, dataclasses.replace(checkpoint.cfg, drafter=opened.cfg)


def test_the_drafters_tensors_and_card(drafter):
    opened, cfg = drafter
    table = drafter_table(cfg, opened.cfg)
    assert opened.types.keys() == {spec.name for spec in table} and opened.types == choose(table, RECIPES["q4"], {})
    card = embedded_drafter().with_suffix(".md").read_text(encoding="utf-8")
    assert "scripts/eval_dspark.py" in card and f"{embedded_drafter().stat().st_size / 1e6:.2f} MB" in card


def test_the_kernels_take_the_drafter(drafter):
    """Traced, not compiled: the kernels' own checks of formats and shapes decide."""
    opened, cfg = drafter
    w, d = (
        jax.tree.map(lambda spec: spec.struct(), tree)
        for tree in (
            weights.abstract(cfg, open_checkpoint(embedded_model("tiny")).types),
            weights.abstract_drafter(cfg, opened.types),
        )
    )
    compute = Compute("official", "bfloat16", kernels="pallas_interpret")
    cache = jax.eval_shape(lambda: kv.zeros(cfg, "official", "bfloat16", 2, 256))
    anchor, active = jnp.zeros(2, jnp.int32), jnp.ones(2, bool)
    drafts = jax.eval_shape(lambda w, d, c: dspark.draft(w, d, c, anchor, active, cfg, compute), w, d, cache)
    assert drafts.logits.shape == (2, opened.cfg.block_size, cfg.vocab_size)


@pytest.mark.slow
def test_drafts_hold_and_change_no_answer():
    """Some of the card's texts, a third of the tokens each; chance would be one draft in 2,048."""
    w, checkpoint = load(embedded_model("tiny"))
    d, cfg = load_drafter(embedded_drafter(), checkpoint)
    tok = Tokenizer.from_metadata(checkpoint.file.metadata)
    prompts = eval_dspark.prompts(tok, eval_dspark.HELD_OUT, 8)
    for kind, least in (("held-out text", 1.4), ("new dialogues", 2.0)):
        found = eval_dspark.measure(w, d, cfg, prompts[kind], 24)
        assert found["answers that differ"] == 0 and found["tokens per round"] > least, (kind, found)
