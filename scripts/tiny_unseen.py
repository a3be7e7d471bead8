"""What the tiny model was not trained on, for its drafter: ``python scripts/tiny_unseen.py --data build/tiny``.

On its own training rows the model is surer than on anything else, and a drafter that learns from these is of little use
elsewhere. So half of these rows are sources of other packages than those of scripts/tiny_data.py, the other half are
dialogues of another seed. The result is unseen.npz in --data, in the format of rows.npz. Needs no GPU.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

import numpy as np  # noqa: E402
import tiny_data  # noqa: E402
from absl import flags  # noqa: E402
from tiny_data import ROW, SHARES, Document, dialogue_document, dialogues, package, text_documents  # noqa: E402
from tiny_dialogues import Generator, held_out  # noqa: E402

from ds4jax.io.checkpoint import open_checkpoint  # noqa: E402
from ds4jax.io.tokenizer import Tokenizer  # noqa: E402
from ds4jax.paths import embedded_model  # noqa: E402
from ds4jax.tools import cli  # noqa: E402

# Installed with the package's test extra, with their licences.
PACKAGES = {
    "scipy": "BSD-3-Clause", "matplotlib": "PSF-2.0", "openai": "Apache-2.0", "anthropic": "MIT",
    "ipython": "BSD-3-Clause", "prompt_toolkit": "BSD-3-Clause", "tornado": "Apache-2.0", "pydantic": "MIT",
    "rich": "MIT", "Pygments": "BSD-2-Clause", "jsonschema": "MIT", "starlette": "BSD-3-Clause",
    "uvicorn": "BSD-3-Clause", "httpx": "BSD-3-Clause", "pytest": "MIT", "huggingface_hub": "Apache-2.0",
    "fonttools": "MIT", "jedi": "MIT",
}  # fmt: skip

FLAGS = flags.FlagValues()
flags.DEFINE_string("data", "build/tiny", "Folder that scripts/tiny_data.py wrote.", flag_values=FLAGS)
flags.DEFINE_string("model", None, "Another GGUF file than the embedded model.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 8192, "How many.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 100_003, "Of the dialogues and of the order.", flag_values=FLAGS)


def main() -> int:
    data, rng = Path(FLAGS.data), random.Random(FLAGS.seed)
    tok = Tokenizer.from_metadata(open_checkpoint(FLAGS.model or embedded_model("tiny")).file.metadata)
    texts = [text for name in PACKAGES for text in package(name) if len(text.text) > 200]
    rng.shuffle(texts)
    documents: list[Document] = []
    generator, size = Generator(FLAGS.seed, held_out()), FLAGS.rows * ROW // 2

    def fill(source: Iterator[Document], tokens: int) -> None:
        for document in source:
            documents.append(document)
            tokens -= len(document[0])
            if tokens <= 0:
                return

    fill((piece for text in texts for piece in text_documents(text.text, tok)), size)
    for kind, share in SHARES.items():
        fill((dialogue_document(dialogue, tok) for dialogue in dialogues(kind, generator, texts)), int(share * size))
    rng.shuffle(documents)
    tokens, mask = tiny_data.pack(documents, tok.eos_id)
    np.savez_compressed(data / "unseen.npz", tokens=tokens, mask=np.packbits(mask, axis=1))
    print(json.dumps({"rows": len(tokens), "predicted": int(mask.sum()), "texts": len(texts)}))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
