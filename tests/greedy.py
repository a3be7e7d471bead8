"""What a shipped model answers to 20 questions, greedily: ``python tests/greedy.py NAME OUT.npz``, in XLA."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 200  # tokens after each prompt, whatever they are


def answers(name: str, kernels: str = "xla") -> dict[str, Any]:
    """tokens (20, STEPS), and for each how far the likeliest logit was above the next, (20, STEPS); logits of the
    first prompt at every position (T, vocab)."""
    from ds4jax.chat import template as chat
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.engine.types import Sampling
    from ds4jax.settings import Settings

    questions = json.loads((Path(__file__).parent / "tiny" / "questions.json").read_text())
    runner = ModelRunner.load(Settings.load(name, batch=20, ctx=512, kernels=kernels))
    tokens, gaps, prompts = [], [], []
    for slot, question in enumerate(questions[:20]):
        messages = [{"role": "user", "content": question["question"]}]
        prompts.append(chat.render_ids(runner.tokenizer, messages, think="off"))
        tokens.append([runner.prefill(slot, prompts[-1], Sampling(temperature=0.0)).token])
    for _ in range(STEPS):
        steps = runner.decode({slot: row[-1] for slot, row in enumerate(tokens)})
        top = np.sort(np.asarray(steps[0].batch_logits), axis=-1)
        gaps.append(top[:, -1] - top[:, -2])
        for slot, row in enumerate(tokens):
            row.append(steps[slot].token)
    return {"tokens": np.array(tokens)[:, 1:], "gaps": np.stack(gaps, 1), "logits": runner.logits(prompts[0])}


if __name__ == "__main__":
    np.savez(sys.argv[2], **answers(sys.argv[1]))
