"""Ctrl-C once asks, twice ends, also while the main thread hears nothing."""

import os
import signal
import subprocess
import sys
import threading

from trainer.alone.interrupts import Interrupts

BUSY = """
import hashlib
from trainer.alone.interrupts import Interrupts

def second():
    print("second", flush=True)

with Interrupts(lambda: print("first", flush=True), second):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # lets threads run, but no handler
"""


def test_once_asks_and_leaves_the_main_thread_alone():
    heard = []
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(lambda: heard.append("first"), lambda: heard.append("second")) as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), signal.SIGINT)
        while not heard:
            pass
        assert interrupts.requested
    assert heard == ["first"]
    assert signal.getsignal(signal.SIGINT) is before


def test_twice_ends_at_once_even_if_the_main_thread_is_busy():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    too_late = threading.Timer(30, process.kill)
    too_late.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert process.stdout.read() == "second\n"
    process.stdout.close()
    too_late.cancel()
