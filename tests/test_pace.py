"""How long a chunk may be, by what chunks took."""

import pytest

from ds4jax.engine.pace import Pace

SIZES = [128, 512, 1024, 2048]


def measured(target, **seconds):
    pace = Pace(SIZES, target)
    for tokens, value in seconds.items():
        pace.took(int(tokens[1:]), value)
    return pace


def test_the_longest_chunk_that_the_target_allows():
    assert Pace(SIZES, 0.15).longest(0.0) == 2048  # nothing is known yet
    assert measured(0.15, _2048=0.2).longest(0.02) == 1024  # in proportion
    assert measured(0.15, _1900=0.2, _1024=0.13).longest(0.0) == 1024
    assert measured(0.15, _2048=0.2, _1024=0.132).longest(0.02) == 512
    assert measured(0.15, _2048=0.12).longest(0.02) == 2048
    assert measured(0.15, _128=0.02).longest(0.02) == 512


def test_no_chunk_is_much_slower_than_the_best():
    slow = {"_128": 1.0, "_512": 1.1, "_1024": 1.3, "_2048": 2.0}
    assert measured(0.15, **slow).longest(0.0) == 1024
    assert measured(1e-9, _2048=2.0).longest(0.0) == 128  # as far as is known, all are as fast


def test_one_slow_call_does_not_count():
    assert measured(0.15, _2048=0.3, _1024=5.0, _512=0.06).longest(0.0) == 1024
    assert measured(0.15, _1024=0.14, _512=5.0).longest(0.0) == 1024
    assert measured(0.25, _2048=0.4, _1024=5.0, _512=0.12).longest(0.0) == 1024


@pytest.mark.parametrize("tokens", [2049, 10**6])
def test_what_is_longer_than_all_sizes_tells_nothing(tokens):
    pace = Pace(SIZES, 0.1)
    pace.took(tokens, 9.0)
    assert pace.longest(0.0) == 2048
