"""The tiny model's training data and tokenizer: ``python scripts/tiny_data.py --out build/tiny``. Needs no GPU.

Text comes from installed packages, dialogues from `tiny_dialogues`. The same versions of the packages (manifest.json
has them) and the same seed give the same files:

    tokenizer.json  the GGUF keys of the tokenizer
    rows.npz        tokens uint16 (rows, ROW) of packed documents, and bits of which tokens are to be predicted
    heldout.json    text that is in no row: [{"name", "text"}]
    manifest.json   sources with version, licence and size; what the rows are made of
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

from tiny_dialogues import Dialogue, Generator, held_out  # noqa: E402

from ds4jax.chat import template as chat  # noqa: E402
from ds4jax.io import tokenizer  # noqa: E402
from ds4jax.io.tokenizer import Special, Tokenizer  # noqa: E402
from ds4jax.tools import cli  # noqa: E402

CONTEXT = 1024
ROW = CONTEXT + 1  # inputs, and one more to be predicted
VOCAB = 2048

# Packages whose sources are training text, with their licences.
PACKAGES = {
    "jax": "Apache-2.0", "flax": "Apache-2.0", "optax": "Apache-2.0", "orbax-checkpoint": "Apache-2.0",
    "etils": "Apache-2.0", "absl-py": "Apache-2.0", "numpy": "BSD-3-Clause",
}  # fmt: skip
HELD_OUT_BYTES = 100_000

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "build/tiny", "Where the files go.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 40_000, f"How many rows of {ROW} tokens.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the dialogues and of the order.", flag_values=FLAGS)


# ---- text ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Text:
    """A file, or a topic of Python's language reference."""

    source: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """About one in 50, of the standard library only."""
        return self.source == "python" and hashlib.sha256(self.name.encode()).digest()[0] < 5


def library() -> list[Text]:
    """Python's standard library without its tests and tables, and the topics of its reference."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "site-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    files = [Text("python", path.relative_to(root).as_posix(), _read(path)) for path in paths]
    return files + [Text("python", f"reference/{name}", text) for name, text in sorted(topics.items())]


def package(name: str) -> list[Text]:
    """The Python sources of an installed distribution, without tests."""
    paths = sorted(p for p in importlib.metadata.files(name) or () if p.suffix == ".py")
    return [Text(name, str(p), _read(Path(p.locate()))) for p in paths if "test" not in str(p)]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# ---- rows ------------------------------------------------------------------------------------------------------------
Document = tuple[Sequence[int], Sequence[bool]]  # tokens, and which of them are to be predicted


def text_documents(text: str, tok: Tokenizer) -> Iterator[Document]:
    """A text in pieces that fit a row, each after BOS. Everything but BOS is to be predicted."""
    ids = tok.encode_text(text)
    for start in range(0, len(ids), CONTEXT):
        piece = [tok.bos_id, *ids[start : start + CONTEXT]]
        yield piece, [False] + [True] * (len(piece) - 1)


def dialogue_document(dialogue: Dialogue, tok: Tokenizer) -> Document:
    """A dialogue as `chat.render` has it. What the assistant writes is to be predicted, the end token included.

    That is everything from the second token after its marker on: the first, <think> or </think>, is given to it.
    """
    think = "on" if dialogue.think else "off"
    ids = chat.render_ids(tok, dialogue.messages, think=think, tools=dialogue.tools, add_generation_header=False)
    assistant, mask, writes = tok.special(Special.ASSISTANT), [], False
    for i, id in enumerate(ids):
        mask.append(writes and ids[i - 1] != assistant)
        writes = (writes or id == assistant) and id != tok.eos_id
    return ids, mask


def pack(documents: Iterable[Document], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents, one after another, in as few rows as may be → tokens uint16 (rows, ROW) and mask bool (rows, ROW).

    A document goes into the fullest of 64 open rows that has room for it. Longer ones than a row are left out.
    fill: the token to fill up with.
    """
    done: list[list[Document]] = []
    rows: list[tuple[int, list[Document]]] = []
    for document in documents:
        size = len(document[0])
        if size > ROW:
            continue
        fitting = [i for i, (used, _) in enumerate(rows) if used + size <= ROW]
        if not fitting and len(rows) == 64:
            done.append(rows.pop(max(range(64), key=lambda i: rows[i][0]))[1])
        if not fitting:
            rows.append((0, []))
        best = max(fitting, key=lambda i: rows[i][0]) if fitting else len(rows) - 1
        used, content = rows[best]
        rows[best] = used + size, [*content, document]
    done += [content for _, content in rows]
    tokens, mask = np.full((len(done), ROW), fill, np.uint16), np.zeros((len(done), ROW), bool)
    for row, content in enumerate(done):
        ids = [id for document in content for id in document[0]]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = [m for document in content for m in document[1]]
    return tokens, mask


SHARES = {"tool_use": 0.52, "conversation": 0.32, "needle": 0.14, "story": 0.02}  # of the tokens that are not text


def dialogues(kind: str, generator: Generator, texts: Sequence[Text]) -> Iterator[Dialogue]:
    """Endless dialogues of one of the kinds in SHARES. texts: what needles are hidden in."""
    rng = generator.rng
    while True:
        if kind != "needle":
            yield getattr(generator, kind)()
            continue
        text = rng.choice(texts).text
        length = rng.choice((400, 800, 1600, 2400, 2400))  # characters; some 2.7 to a token
        start = rng.randrange(max(1, len(text) - length))
        depths = [rng.random() for _ in range(rng.randint(1, 4))]
        yield generator.needles(text[start : start + length], depths)[0]


def main() -> None:
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = library() + [text for name in PACKAGES for text in package(name)]
    kept = [text for text in texts if not text.held_out and len(text.text) > 200]
    rng = random.Random(FLAGS.seed)
    rng.shuffle(kept)

    sample = [text.text for text in kept[: len(kept) // 4]]
    generator = Generator(FLAGS.seed, held_out())
    for kind in SHARES:
        source = dialogues(kind, generator, kept)
        for _ in range(2000 if kind == "conversation" else 500):
            sample.append(chat.to_text(chat.render(**_render_arguments(next(source)))))
    tok = tokenizer.train(sample, VOCAB)

    documents: list[Document] = []
    for text in tqdm(kept, desc="text"):
        documents += text_documents(text.text, tok)
    counts = {"text": sum(len(ids) for ids, _ in documents)}
    rest = max(0, FLAGS.rows * ROW - counts["text"])
    generator = Generator(FLAGS.seed + 1, held_out())
    for kind, share in SHARES.items():
        counts[kind], source = 0, dialogues(kind, generator, kept)
        with tqdm(total=int(share * rest), desc=kind) as bar:
            while counts[kind] < share * rest:
                documents.append(dialogue_document(next(source), tok))
                counts[kind] += len(documents[-1][0])
                bar.update(len(documents[-1][0]))
    rng.shuffle(documents)
    tokens, mask = pack(documents, tok.eos_id)
    order = np.random.default_rng(FLAGS.seed).permutation(len(tokens))[: FLAGS.rows]
    np.savez_compressed(out / "rows.npz", tokens=tokens[order], mask=np.packbits(mask[order], axis=1))

    held, size = [], 0
    for text in sorted((t for t in texts if t.held_out), key=lambda t: hashlib.sha256(t.name.encode()).digest()):
        if 1000 < len(text.text) < HELD_OUT_BYTES - size:
            held.append({"name": text.name, "text": text.text})
            size += len(text.text)
    sources: dict[str, dict[str, str | int]] = {"python": {"version": platform.python_version(), "licence": "PSF-2.0"}}
    sources |= {n: {"version": importlib.metadata.version(n), "licence": licence} for n, licence in PACKAGES.items()}
    for name, source in sources.items():
        source["bytes"] = sum(len(text.text.encode()) for text in kept if text.source == name)
    manifest = {"sources": sources, "rows": len(order), "tokens": counts, "predicted": int(mask[order].sum())}
    for name, content in (("tokenizer", tok.to_metadata()), ("heldout", held), ("manifest", manifest)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(manifest, indent=1))


def _render_arguments(dialogue: Dialogue) -> dict:
    think = "on" if dialogue.think else "off"
    return {"messages": dialogue.messages, "think": think, "tools": dialogue.tools, "add_generation_header": False}


def load(folder: str | Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer, tokens uint16 (rows, ROW) and mask bool (rows, ROW) that were written to `folder`."""
    folder = Path(folder)
    tok = Tokenizer.from_metadata(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    return tok, *load_rows(folder / "rows.npz")


def load_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """tokens uint16 (rows, ROW) and mask bool (rows, ROW) of a file."""
    with np.load(path) as file:
        tokens = file["tokens"]
        return tokens, np.unpackbits(file["mask"], axis=1, count=tokens.shape[1]).astype(bool)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
