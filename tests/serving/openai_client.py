"""The `openai` package against a server: `openai_client.py BASE_URL KEY`. The model is one of bytes with a chat
template; any difference from what the package expects is an exception here."""

import sys

import openai

base_url, key = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)

[model] = client.models.list().data
assert model.id == "tiny"
assert client.models.retrieve("tiny").id == "tiny"

fixed = dict(model="tiny", max_tokens=12, seed=5, extra_body={"ignore_eos": True, "return_token_ids": True})
whole = client.completions.create(prompt="Once upon a time", logprobs=2, **fixed)
choice = whole.choices[0]
assert choice.finish_reason == "length" and whole.usage.completion_tokens == 12
assert len(choice.token_ids) == len(choice.logprobs.token_logprobs) == 12
assert all(1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
chunks = list(client.completions.create(prompt="Once upon a time", stream=True, **fixed))
assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
by_ids = client.completions.create(prompt=list(b"Once upon a time"), **fixed)
assert by_ids.choices[0].text == choice.text

messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
answer = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **fixed)
said = answer.choices[0]
assert said.message.role == "assistant" and len(said.logprobs.content) == 12
for place in said.logprobs.content:
    assert len(place.top_logprobs) == 3 and place.logprob <= place.top_logprobs[0].logprob
    assert bytes(place.bytes)
options = {"include_usage": True}
chunks = list(client.chat.completions.create(messages=messages, stream=True, stream_options=options, **fixed))
assert chunks[0].choices[0].delta.role == "assistant"
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == said.message.content
assert chunks[-1].usage.completion_tokens == 12 and chunks[-2].choices[0].finish_reason == "length"
parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
assert client.chat.completions.create(messages=parts, **fixed).choices[0].message.content == text


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


error = refused(openai.BadRequestError, lambda: client.completions.create(model="tiny", prompt="a", temperature=-1))
assert error.type == "invalid_request_error" and "temperature" in error.message
refused(openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a"))
other = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
refused(openai.AuthenticationError, other.models.list)
print("the openai package agrees")
