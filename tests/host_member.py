"""A process of a group without a model: ``host_member.py COORDINATOR PROCESSES NUMBER``. Process 0 calls and calls."""

import os
import sys
import time

from ds4jax.engine import hosts
from ds4jax.engine.hosts import Leader, Patience, Place
from ds4jax.engine.model_runner import ModelRunner


class Runner(ModelRunner):
    def __init__(self):
        pass

    def clear(self, slot):
        pass


def main(coordinator, processes, number):
    host, port = coordinator.split(":")
    place = Place(host, int(port), int(number), int(processes))
    with hosts.join(place, {"a": 1}, Patience(join=120.0, silence=20.0)) as joined:
        if not isinstance(joined, Leader):
            joined.meet({"b": 2})
            return joined.follow(Runner())
        joined.meet({"b": 2})
        print("serving nothing at http://nowhere", file=sys.stderr, flush=True)
        while True:
            joined.tell("clear", (0,), {})
            time.sleep(0.1)


main(*sys.argv[1:])
os._exit(0)
