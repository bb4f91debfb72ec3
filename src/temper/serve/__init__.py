"""A server for what was trained: OpenAI's protocol, a playground, and what people say of the answers."""
