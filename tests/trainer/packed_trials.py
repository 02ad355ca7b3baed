"""Trials of a pack, each in a folder of its own; as a program, one that is killed.

    python -m tests.trainer.packed_trials FOLDER DATA_HOME STEP

kills its own process, as `kill -9` would, when the second trial's charge of STEP is durable.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from tests.trainer.killed_trial import CONFIG, kept_in
from trainer.loop import packed_reports
from trainer.pack import Pack

# All in which trials of one shape may differ, the steps between their reports included.
CONFIGS = (
    CONFIG,
    dataclasses.replace(
        CONFIG, learning_rate=0.25, l2_clip_norm=2.0, noise_multiplier=3.0, report_every_steps=3
    ),
    dataclasses.replace(
        CONFIG, learning_rate_schedule="cosine", warmup_steps=2, weight_decay=0.1, iterations=8
    ),
)


def going(pack, folder, data_home, config, on_charge=None, **more):
    """Goes on with what is in a folder, or begins there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = kept_in(folder, config, on_charge)
    return packed_reports(pack, config, data_home=data_home, **kept, **more)


def drive(pack, running):
    """Runs the trials of a pack to their ends.

    Args:
        pack: The pack.
        running: Their generators, by name.

    Yields:
        A name and a report, or the error with which that trial ended.
    """
    running = dict(running)
    while running:
        waiting = 0
        for name, reports in list(running.items()):
            try:
                report = next(reports)
            except StopIteration:
                del running[name]
            except Exception as error:
                del running[name]
                yield name, error
            else:
                waiting += report is None
                if report is not None:
                    yield name, report
        if waiting and waiting == len(running):
            pack.run()


def train(folder, data_home, configs=CONFIGS, width=4, **of_second):
    """Runs some trials to their ends; gives what each reported, and the error if it ended so."""
    pack, found = Pack(width), {number: [] for number in range(len(configs))}
    running = {
        number: going(
            pack, folder / str(number), data_home, config, **(of_second if number == 1 else {})
        )
        for number, config in enumerate(configs)
    }
    for number, report in drive(pack, running):
        found[number].append(report)
    return found


if __name__ == "__main__":
    kill_at = int(sys.argv[3])

    def on_charge(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train(Path(sys.argv[1]), Path(sys.argv[2]), on_charge=on_charge)
