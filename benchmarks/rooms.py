"""Scenes per second of the ray-caster on one core: python benchmarks/rooms.py [--scenes N] [--size PIXELS]."""

import argparse
import time

from dag.data.rooms import render

EXPECTED = 250  # scenes/s at 32 x 32, the least that drawing half a million training scenes can bear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()
    render(range(8), arguments.size)  # page in the code and its tables
    start, cpu = time.perf_counter(), time.process_time()
    render(range(arguments.scenes), arguments.size)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{arguments.scenes} scenes at {arguments.size} x {arguments.size}: {arguments.scenes / elapsed:.0f} scenes/s, "
        f"{arguments.scenes / cpu:.0f} per CPU second (expected at 32 x 32 on an idle core: {EXPECTED} or more)"
    )


if __name__ == "__main__":
    main()
