"""Where figures go, each behind one small protocol."""
