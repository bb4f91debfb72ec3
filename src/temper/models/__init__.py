"""transformers' models and PEFT's adapters as they are, behind one `Policy`; knows nothing of recipes or algorithms."""
