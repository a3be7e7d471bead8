"""The scheduler alone: fair, no job starves, no slot leaks, chunks end where they must, nothing is computed twice."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ds4jax.engine.scheduler import LEAST, MAX_PASSED, Scheduler
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import ALIGN, Request, Sampling


def job(tokens, client="", **rest):
    tokens = list(tokens) if not isinstance(tokens, int) else [7] * tokens
    return Sequence(Request(tokens, 1, Sampling(), client=client), **rest)


def step(scheduler, start=lambda job: 0) -> tuple[list, Any, list]:
    """One step as the engine makes it; → who was admitted, whose chunk ran and how long it was, who decoded."""

    def begin(job):
        return start(job) if job.suspended is None else job.computed

    if victim := scheduler.victim(begin):
        scheduler.suspend(victim)
        victim.suspended = True
    admitted = scheduler.admit(begin)
    assert victim not in admitted
    for who in admitted:
        who.suspended = None
    chunk = scheduler.next_chunk()
    if chunk:
        who, end = chunk
        chunk = who, end - who.computed
        scheduler.advance(who, end)
    decoded = list(scheduler.decoding)
    for who in decoded:
        scheduler.advance(who, who.computed + 1)
    return admitted, chunk, decoded


JOBS = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 9)), min_size=1, max_size=24)


@given(JOBS, st.integers(1, 4), st.sampled_from([64, 128, 512]), st.integers(1, 3), st.randoms(use_true_random=False))
def test_whatever_comes_and_goes(jobs, slots, chunk, clients, rng):
    scheduler, answers, steps = Scheduler(slots, chunk), {}, 0
    coming = [(job(n, str(rng.randrange(clients))), rng.randrange(6), answer) for n, answer in jobs]
    while coming or len(scheduler):
        for new in [entry for entry in coming if entry[1] <= steps]:
            coming.remove(new)
            answers[new[0]] = new[2]
            scheduler.add(new[0])
        before, done = list(scheduler.decoding), {who: who.computed for who in scheduler}
        _, ran, decoded = step(scheduler)
        # Every answer goes on in every step, beside one chunk at most, of at most `chunk` tokens; one is suspended for
        # another client only.
        assert len(set(before) - set(decoded)) <= (clients > 1) and (not ran or 0 < ran[1] <= chunk)
        assert all(who.computed >= done[who] for who in scheduler)  # nothing is computed twice
        assert clients > 1 or all(who.passed <= MAX_PASSED for who in scheduler)
        holding = [who.slot for who in scheduler if who.slot is not None]
        assert len(set(holding)) == len(holding) <= slots and set(holding) <= set(range(slots))
        assert not scheduler.waiting or len(holding) == slots  # no slot is idle while a job waits
        for who in decoded:
            if who.computed - who.prompt_len >= answers[who] or rng.random() < 0.05:
                scheduler.remove(who)
        for who in list(scheduler):
            if rng.random() < 0.02:  # cancelled, wherever it is
                scheduler.remove(who)
        steps += 1
        assert steps < 2000
    scheduler.add(last := job(1))
    assert step(scheduler)[0] == [last] and len(scheduler._free) == slots - 1  # all slots came back


@given(st.integers(1, 3000), st.integers(0, 2999), st.sampled_from([128, 256, 2048]), st.sets(st.integers(1, 23)))
def test_chunks_end_at_marks_and_at_fixed_positions(prompt, start, chunk, marks):
    marks = {ALIGN * m for m in marks if ALIGN * m <= prompt}
    scheduler, start = Scheduler(1, chunk), min(start // ALIGN * ALIGN, prompt - 1)
    scheduler.add(one := job(prompt, marks=marks))
    ends, admitted = [], scheduler.admit(lambda job: start)
    while following := scheduler.next_chunk():
        ends.append(following[1])
        scheduler.advance(one, ends[-1])
    fixed = {prompt, *marks, *range(chunk, prompt, chunk)}
    assert admitted == [one] and ends == sorted(end for end in fixed if end > start)


def test_prompts_take_turns():
    """A prompt's last chunk comes out of turn, but not two in a row."""
    scheduler = Scheduler(3, 128)
    long, short, third = job(2000), job(300), job(1)
    for new in (long, short, third):
        scheduler.add(new)
    assert [step(scheduler)[1][0] for _ in range(6)] == [third, long, short, long, short, short]


def test_equal_prompts_get_slots_as_they_come():
    scheduler = Scheduler(2, 128)
    jobs = [job(100) for _ in range(9)]
    for new in jobs:
        scheduler.add(new)
    order = []
    while len(scheduler):
        admitted, _, decoded = step(scheduler)
        order += admitted
        for who in decoded:
            scheduler.remove(who)
    assert order == jobs


def test_a_short_prompt_waits_for_no_long_one():
    """Six long prompts, four slots: a short one that comes has its chunk in the next step, or soon after it."""
    scheduler = Scheduler(4, 128)
    longs = [job(3800) for _ in range(6)]
    for new in longs:
        scheduler.add(new)
    steps = []
    for _ in range(40):
        step(scheduler)
        scheduler.add(short := job(20))
        ran = [step(scheduler)[1][0] for _ in range(3)]
        steps.append(ran.index(short))
        scheduler.remove(short)
    assert steps.count(0) > 30
    while len(scheduler):
        for who in step(scheduler)[2]:
            scheduler.remove(who)
    assert all(long.computed > 3800 for long in longs)


def test_short_prompts_without_end_do_not_stop_a_long_one():
    scheduler = Scheduler(2, 128)
    scheduler.add(long := job(3800))
    steps = 0
    while long.computed < long.prompt_len:
        scheduler.add(job(20))
        _, _, decoded = step(scheduler)
        for who in decoded:
            if who.computed > 22 and who is not long:
                scheduler.remove(who)
        steps += 1
    assert 30 < steps < 600


def test_clients_share_the_slots():
    scheduler = Scheduler(4, 128)
    for _ in range(200):
        scheduler.add(job(20, "first"))
    for _ in range(5):
        step(scheduler)
    assert len(scheduler.decoding) == 4
    for _ in range(3):
        scheduler.add(job(20, "second"))
    for _ in range(5):
        step(scheduler)
    assert [who.client for who in scheduler.decoding] == ["first"] * 4  # which have not computed enough yet
    for _ in range(LEAST):
        step(scheduler)
    assert sorted(who.client for who in scheduler.decoding) == ["first", "first", "second", "second"]
    scheduler.add(job(20, "third"))
    for _ in range(LEAST):
        step(scheduler)
    assert {who.client for who in scheduler.decoding} == {"first", "second", "third"}


def test_who_has_most_takes_nothing_from_who_has_less():
    """A short prompt of a client with two answers would not get the slot that a long one of another gave up."""
    scheduler = Scheduler(3, 128)
    for new in (job(20, "a"), job(20, "a"), long := job(3800, "b")):
        scheduler.add(new)
    for _ in range(4):
        step(scheduler)
    scheduler.add(job(20, "a"))
    before = long.computed
    for _ in range(10):
        step(scheduler)
    assert long.slot is not None and long.computed == before + 10 * 128


def test_who_is_suspended_goes_on_whatever_other_clients_ask():
    scheduler = Scheduler(2, 128)
    for _ in range(2):
        scheduler.add(job(20, "a"))
    for _ in range(3):
        step(scheduler)
    steps = 0
    while steps < 300:
        scheduler.add(job(20, "b"))
        suspended = [who for who in scheduler.waiting if who.suspended]
        for who in step(scheduler)[2]:
            if who.client == "b" and who.computed > 25:
                scheduler.remove(who)
        steps += 1
        assert all(who.passed <= MAX_PASSED for who in suspended)
    mine = [who for who in scheduler if who.client == "a"]
    assert all(who.computed > 40 for who in mine)


def test_a_client_has_no_more_slots_than_it_may():
    scheduler = Scheduler(4, 128, per_client=1)
    for name in "aaab":
        scheduler.add(job(20, name))
    step(scheduler)
    assert sorted(who.client for who in scheduler if who.slot is not None) == ["a", "b"]


def test_a_job_that_waits_lets_others_pass_and_keeps_its_place():
    scheduler = Scheduler(1, 128)
    first, second = job(10), job(20)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.admit(lambda job: None if job is first else 0) == [second]
    scheduler.remove(second)
    scheduler.add(job(30))
    assert scheduler.admit(lambda job: 0) == [first]


def test_what_is_known_in_full_decodes_at_once():
    scheduler = Scheduler(1, 128)
    scheduler.add(one := job(10))
    assert step(scheduler, lambda job: 10) == ([one], None, [one])


# ---- prompts that have a beginning in common -------------------------------------------------------------------------
def waits(a, b, have=0, run=0):
    """Whether b should wait for a, of which `run` chunks have run; and a."""
    scheduler = Scheduler(2, 128)
    scheduler.add(one := job(a))
    scheduler.admit(lambda job: 0)
    for _ in range(run):
        scheduler.advance(*(scheduler.next_chunk() or (one, 0)))
    return scheduler.should_wait(job(b), have), one


def test_a_job_waits_for_a_prefix_that_is_being_computed():
    shared = list(range(300))
    waiting, leader = waits(shared + [1] * 200, shared + [2] * 200)
    assert waiting and leader.marks == {256}


def test_it_waits_only_for_what_it_lacks_and_what_is_to_come():
    shared = list(range(300))
    a, b = shared + [1] * 200, shared + [2] * 200
    assert not waits(a, b, have=256)[0] and waits(a, b, have=128)[0]
    assert not waits(a, b, run=2)[0] and waits(a, b, run=1)[0]
    assert not waits(list(range(127)) + [1], list(range(127)) + [2])[0]  # nothing to share


def test_the_same_prompt_is_waited_for_to_its_end():
    waiting, leader = waits([5] * 100, [5] * 100)
    assert waiting and leader.marks == {100}


def test_one_token_at_least_is_left_to_compute_of_a_longer_prompt():
    waiting, leader = waits([5] * 256 + [6], [5] * 256)
    assert waiting and leader.marks == {128}  # of 256 there would be no logits


def test_it_waits_for_one_job_only():
    """What the first one computed may be gone again; without an end to waiting, a stream of others would pass it."""
    scheduler, rng = Scheduler(2, 128), random.Random(0)
    shared = [rng.randrange(9) for _ in range(300)]
    patient = job(shared + [1])
    for i in range(5):
        scheduler.add(other := job(shared + [2, i]))
        scheduler.admit(lambda job: 0)
        if i == 0:
            assert scheduler.should_wait(patient, 0)
        scheduler.advance(other, other.prompt_len)
        scheduler.remove(other)
        assert not scheduler.should_wait(patient, 0)
    scheduler.add(other := job(shared + [3]))
    scheduler.admit(lambda job: 0)
    assert not scheduler.should_wait(patient, 0)


def test_a_mark_that_comes_with_the_whole_prompt_is_waited_for():
    scheduler = Scheduler(2, 1024)
    scheduler.add(leader := job(300, marks={256}))
    scheduler.admit(lambda _: 0)
    assert not scheduler.ends_next(leader)
    scheduler.advance(leader, 256)
    assert scheduler.ends_next(leader)
    other = job(300)
    other.key = leader.key[: 4 * 280] + b"else" * 20
    assert not scheduler.should_wait(other, 0)  # what is there up to 256 can be had now
    leader.deferred_mark = 256
    assert not scheduler.should_wait(other, 256) and scheduler.should_wait(other, 128)
    scheduler.add(other)
    assert not scheduler.ends_next(leader)  # it would be kept for whoever waits
