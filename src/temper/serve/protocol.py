"""What requests may say: OpenAI's fields, and a few of vLLM's. What is not supported is refused by name.

https://platform.openai.com/docs/api-reference, https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from temper.rollouts.decoding import Decoding

MOST_ANSWERS = 128  # of one request
MOST_TOPS = 20  # OpenAI's limit of top_logprobs
COLDEST = 1e-6  # a temperature below is 0: float32 logits divided by less come to infinities, and their softmax to no number


def _whole(text: str) -> str:
    """Half a character, escaped alone (\\ud83d), is legal JSON and no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """What a request says; fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


# Fields of OpenAI's that change an answer in ways that are not supported, and the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},), "suffix": ("",), "parallel_tool_calls": (True, False), "store": (False,),
    "service_tier": ("auto", "default"), "modalities": (["text"],), "functions": ([],), "function_call": ("none", "auto"),
}  # fmt: skip


class StreamOptions(Body):
    """What a stream says beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(Body):
    """What both ways of asking have in common."""

    model: Text = Field(description="A name that /v1/models lists.")
    stream: bool | None = Field(default=None, description="Send pieces as they come, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = Field(default=None, description="Answers to each prompt.")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(default=None, description="The same seed gives the same answer.")  # fmt: skip
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = Field(default=None, description="0: always the likeliest token. Default 1.")  # fmt: skip
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(default=None, description="As vLLM has it; -1 and 0: all tokens.")  # fmt: skip
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(default=None, description="As vLLM has it.")
    repetition_penalty: Annotated[Number, Field(ge=1e-4, le=1e4)] | None = Field(default=None, description="As vLLM has it.")  # fmt: skip
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(default=None, description="As vLLM has it.")
    user: Text | None = Field(default=None, description="Changes nothing.")
    metadata: dict[str, Any] | None = Field(default=None, description="Changes nothing.")

    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    service_tier: Any = None

    @model_validator(mode="after")
    def _supported(self) -> _Request:
        for name, values in NEUTRAL.items():
            value = getattr(self, name, None)
            neutral = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
            if value is not None and not neutral:
                raise ValueError(f"«{name}» is not supported, and would be ignored: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("«stream_options» belongs to a stream: set stream")
        return self

    @property
    def strings(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def decoding(self, new_tokens: int) -> Decoding:
        """How answers are decoded, with at most so many tokens.

        Raises:
            ValueError: settings that contradict one another.
        """
        return Decoding(
            max_new_tokens=new_tokens,
            min_new_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature if self.temperature >= COLDEST else 0.0,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=self.strings,
        )


class Part(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1)]

    # What an answer of ours or of OpenAI's brings along when it is sent back as a part of the conversation.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOPS)] | None = None

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _answerable(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last of the «messages» must be the user's")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("«top_logprobs» belongs to logprobs: set logprobs")
        if self.max_tokens == 0:
            raise ValueError("«max_tokens» must be at least 1")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("«max_tokens» and «max_completion_tokens» differ: give one")
        return self

    @property
    def wanted(self) -> int | None:
        """New tokens asked for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int:
        return self.top_logprobs or 0


class CompletionRequest(_Request):
    """A text, or several, to go on from."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1024)] | Annotated[list[Token], Field(min_length=1)] | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=1024)]  # fmt: skip
    echo: bool | None = Field(default=None, description="Give the prompt back too, with its log-probabilities if asked.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOPS)] | None = None
    best_of: int | None = None
    return_token_ids: bool | None = Field(default=None, description="As vLLM has it: token ids of prompt and answer too.")
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = Field(default=None, description="As vLLM has it: tokens that end an answer, beside the model's own.")  # fmt: skip
    ignore_eos: bool | None = Field(default=None, description="As vLLM has it: the model's own end tokens do not end an answer.")  # fmt: skip

    suffix: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("«best_of» is not supported, and would be ignored: leave it out")
        if self.stream and (self.echo or self.return_token_ids):
            raise ValueError(f"«{'echo' if self.echo else 'return_token_ids'}» cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("«max_tokens» must be at least 1 without echo")
        return self

    @property
    def wanted(self) -> int | None:
        """New tokens asked for; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int:
        return self.logprobs or 0

    def ends(self, own: frozenset[int]) -> frozenset[int]:
        """Tokens that end an answer, given the model's own."""
        return (frozenset() if self.ignore_eos else own) | frozenset(self.stop_token_ids or [])

    @property
    def prompts(self) -> list[str | list[int]]:
        """One after another."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class LoadAdapter(Body):
    """vLLM's request for another adapter."""

    lora_name: Text
    lora_path: Text
    load_inplace: Literal[False] = False


class UnloadAdapter(Body):
    """vLLM's request to serve an adapter no more."""

    lora_name: Text


class Weights(Body):
    """Where weights lie."""

    weights_path: Text


class Reload(Body):
    """vLLM's call of a method of its workers; of all these one is known."""

    method: Literal["reload_weights"]
    kwargs: Weights
