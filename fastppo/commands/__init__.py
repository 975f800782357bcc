"""The commands of `fastppo`: flags, printing, exit codes. torch is imported only once a command runs."""
