"""What a client does to a server, by the openai package: `python openai_client.py PORT` prints JSON.

Run by `vllm_serving.py` in the environment that has the package.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import openai


def ask(client: Any, **options: Any) -> Any:
    return client.completions.create(model="model", temperature=0, **options)


async def at_once(port: int, number: int) -> list[str]:
    """The texts of so many requests that are under way together."""
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    prompts = [f"And it came to pass in the {n}th year" for n in range(number)]
    answers = await asyncio.gather(
        *(ask(client, prompt=prompt, max_tokens=24) for prompt in prompts)
    )
    return [answer.choices[0].text for answer in answers]


def main() -> None:
    port = int(sys.argv[1])
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    report: dict[str, Any] = {"models": [m.id for m in client.models.list()]}

    whole = ask(client, prompt="And it came to pass", max_tokens=24).choices[0].text
    stream = ask(client, prompt="And it came to pass", max_tokens=24, stream=True)
    report["stream equals whole"] = "".join(c.choices[0].text for c in stream) == whole
    assert report["stream equals whole"], whole

    chat = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": "Who is the king?"}],
        max_tokens=16, stream=True, temperature=0,
    )  # fmt: skip
    report["chat"] = "".join(c.choices[0].delta.content or "" for c in chat)
    assert report["chat"]

    one_by_one = [
        ask(client, prompt=f"And it came to pass in the {n}th year", max_tokens=24).choices[0].text
        for n in range(32)
    ]
    started = time.perf_counter()
    together = asyncio.run(at_once(port, 32))
    report["32 at once, seconds"] = round(time.perf_counter() - started, 2)
    report["equal to one by one"] = sum(a == b for a, b in zip(one_by_one, together))
    assert len(together) == 32
    assert all(together)

    stopped = ask(client, prompt="And it came to pass", max_tokens=400, stream=True)
    next(iter(stopped))
    stopped.close()
    report["after a stopped client"] = bool(ask(client, prompt="And", max_tokens=4).choices[0].text)
    assert report["after a stopped client"]

    try:
        ask(client, prompt=" and".join("it" for _ in range(2000)), max_tokens=4)
        raise AssertionError("a prompt longer than the model's context was taken")
    except openai.BadRequestError as error:
        report["overlong prompt"] = f"{error.status_code}: {error.body['message'][:120]}"  # type: ignore[index]
    assert ask(client, prompt="And", max_tokens=4).choices[0].text
    print(json.dumps(report))


if __name__ == "__main__":
    main()
