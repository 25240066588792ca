"""The server behind the client of the openai package: python docs/examples/openai_client.py [URL of the server]."""

import sys

import openai


def main(base_url: str) -> None:
    """Connects to the server, and asks."""
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        ask(client)


def ask(client: openai.OpenAI) -> None:
    """Asks for a model's name, a whole answer, two answers as a stream, log-probabilities, and what is refused."""
    model = client.models.list().data[0].id

    whole = client.completions.create(model=model, prompt="Alice was beginning to", max_tokens=24, temperature=0)
    print(f"{whole.choices[0].text!r} ended by {whole.choices[0].finish_reason}")

    texts = ["", ""]
    stream = client.completions.create(model=model, prompt="The Queen", n=2, seed=7, max_tokens=24, stream=True)
    for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.text
    print(*map(repr, texts), sep="\n")

    rated = client.completions.create(model=model, prompt="A", max_tokens=3, temperature=0, logprobs=2)
    if rated.choices[0].logprobs:
        print("best first tokens:", rated.choices[0].logprobs.top_logprobs[0])  # type: ignore[index]

    try:
        client.completions.create(model=model, prompt="A" * 5000)
    except openai.BadRequestError as error:
        print(f"refused, {error.code}: {error.body['message']}")  # type: ignore[index]


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["http://127.0.0.1:8000/v1"])
