"""C for the processor at hand: sources beside this file, compiled on first use and kept in the user's cache folder."""
