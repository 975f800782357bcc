"""Imported by multiprocessing's fork server alone, as the first thing: it lives as long as its workers are needed.

Schedulers send SIGTERM and SIGUSR1 to every process of a job. The trainer decides what follows from them; without the
fork server it could neither see whether workers live nor start others.
"""

import signal

for name in ("SIGTERM", "SIGUSR1"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
