"""Text from models. A sampler takes prompts as token ids and gives token ids; it trains nothing and scores nothing."""
