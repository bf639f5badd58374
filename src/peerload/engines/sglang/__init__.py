"""SGLang: its loader plug-in, and its layouts without an instance."""
