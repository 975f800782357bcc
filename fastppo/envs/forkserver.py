"""Signal handling of multiprocessing's fork server, which imports this module first.

Schedulers send SIGTERM and SIGUSR1 to every process of a job. The trainer alone reacts to them; without the fork server
it could neither check whether workers are alive nor start new ones.
"""

import signal

for name in ("SIGTERM", "SIGUSR1"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
