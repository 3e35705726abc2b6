"""One-shot generation of small specialised Transformers from a large one."""
