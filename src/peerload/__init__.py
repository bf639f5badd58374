"""peerload: a new LLM replica loads its weights out of the memory of running ones. Importing it does nothing."""
