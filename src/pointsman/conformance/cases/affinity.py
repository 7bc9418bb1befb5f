"""Sessions and prefixes that stay where they are."""

from __future__ import annotations

import itertools

from pointsman.conformance.case import LLMD, LLMD_TESTS, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.engine import Load
from pointsman.conformance.subject import OK, Subject, completion, post

TOKEN = "x-session-token"
IF_AVAILABLE = [("prefer", "if-available")]
IN_A_ROW = 8
_prompts = itertools.count(1)


def _prompt() -> str:
    """4 KB that no other prompt begins with."""
    number = f"{next(_prompts)} "
    return number * (4096 // len(number))


async def _token(subject: Subject) -> tuple[str, bytes]:
    """Where a request went, and the session token of its response."""
    body = completion()
    async with subject.exchange() as stream:
        name = subject.chosen(await stream.request(post(body), [body]))
        answer = await stream.response_headers(OK)
    return name, answer.header(TOKEN) or b""


@case(
    "session-token-given",
    f"Response headers are given {TOKEN}, another one for each endpoint.",
    LLMD_TESTS,
    group="session",
)
async def session_token_given(subject: Subject) -> None:
    tokens = {}
    for best in "abc":
        await subject.show(**{name: Load(5, 0.5) for name in "abc" if name != best})
        name, tokens[best] = await _token(subject)
        equal("the choice", name, best)
    check(b"" not in tokens.values(), f"no {TOKEN} is given")
    equal("the number of different tokens", len(set(tokens.values())), 3)


@case(
    "session-token-followed",
    "A request with it goes to the same endpoint, though another is better; a strange one is nothing.",
    LLMD_TESTS,
    group="session",
)
async def session_token_followed(subject: Subject) -> None:
    await subject.show(b=Load(5, 0.5), c=Load(5, 0.5))
    name, token = await _token(subject)
    equal("the choice", name, "a")
    await subject.show(a=Load(9, 0.9), c=Load(5, 0.5))
    with_token = await subject.ask(extra=[(TOKEN, token.decode("latin-1"))])
    equal("the choice with the token", subject.chosen(with_token), "a")
    equal("the choice without one", subject.chosen(await subject.ask()), "b")
    equal("the choice with a strange one", subject.chosen(await subject.ask(extra=[(TOKEN, "%%%")])), "b")


@case(
    "prefix-followed",
    "A prompt goes where it went before, others elsewhere when that endpoint has the longer queue.",
    LLMD,
    group="prefix",
)
async def prefix_followed(subject: Subject) -> None:
    await subject.show()
    prompt = _prompt()
    home = subject.chosen(await subject.ask(prompt=prompt))
    again = [subject.chosen(await subject.ask(prompt=prompt + str(i))) for i in range(IN_A_ROW)]
    equal("where the same prompt goes", set(again), {home})
    await subject.show(**{home: Load(2)})
    equal("where it goes with a queue there", subject.chosen(await subject.ask(prompt=prompt)), home)
    check(
        subject.chosen(await subject.ask(prompt=_prompt())) != home, "another prompt joins the longest queue"
    )


@case(
    "prefix-if-available",
    "With `prefer: if-available` a prompt that nobody holds is refused with 412, another is routed.",
    LLMD,
    group="prefix",
)
async def prefix_if_available(subject: Subject) -> None:
    await subject.show()
    prompt = _prompt()
    (await subject.ask(prompt=prompt, extra=IF_AVAILABLE)).refusal(412)
    home = subject.chosen(await subject.ask(prompt=prompt))
    equal("the choice", subject.chosen(await subject.ask(prompt=prompt, extra=IF_AVAILABLE)), home)


@case(
    "prefix-by-model-and-salt",
    "Prompts of another model, or with another cache_salt, have no prefix in common.",
    LLMD,
    group="prefix",
)
async def prefix_by_model_and_salt(subject: Subject) -> None:
    await subject.show()
    prompt = _prompt()
    subject.chosen(await subject.ask(prompt=prompt))
    subject.chosen(await subject.ask(prompt=prompt, extra=IF_AVAILABLE))
    (await subject.ask(prompt=prompt, model="adapter-a", extra=IF_AVAILABLE)).refusal(412)
    (await subject.ask(prompt=prompt, cache_salt="s", extra=IF_AVAILABLE)).refusal(412)
