"""Images, video and audio in messages: named by content, weighed in tokens, never hashed as text."""

from __future__ import annotations

import base64
import json
import struct
import time

import pytest
from xxhash import xxh64_hexdigest

from pointsman import api

PATH = "/v1/chat/completions"


def png(width, height, size=200):
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)
    return base64.b64encode(head + bytes(size)).decode()


def jpeg(width, height, exif=0):
    app = b"\xff\xe1" + struct.pack(">H", exif + 2) + bytes(exif) if exif else b""
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)
    return base64.b64encode(b"\xff\xd8" + app + frame + bytes(50)).decode()


def gif(width, height):
    return base64.b64encode(b"GIF89a" + struct.pack("<HH", width, height) + bytes(50)).decode()


def parse(*parts, headers=None, before="look"):
    messages = [{"role": "user", "content": [{"type": "text", "text": before}, *parts]}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    return api.find(PATH).parse("r1", PATH, headers or {}, body)


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url} | more}


def data(request):
    (prompt,) = request.prompts
    return bytes(prompt.data)


def test_an_inline_image_is_its_hash_and_its_pixels():
    payload = "data:image/png;base64," + png(1920, 1080, size=500_000)
    request = parse(image(payload))
    assert request.media == ((xxh64_hexdigest(payload.encode()), 1920 * 1080 // 1024),)
    assert len(data(request)) < 10_000
    assert request.media[0][0].encode() in data(request)
    assert request.prompt_tokens == -(-len(data(request)) // 4)
    assert abs(request.prompt_tokens - 2025) < 50


def test_the_bytes_around_the_image_stay_as_they_were():
    plain, pictured = parse(image("http://h/a.png")), parse(image("http://h/a.png", detail="low"))
    digest = xxh64_hexdigest(b"http://h/a.png").encode()
    before, _, after = data(plain).partition(digest)
    assert (
        before == b'[{"role": "user", "content": [{"type": "text", "text": "look"}, '
        b'{"type": "image_url", "image_url": {"url": "'
    )
    assert after.endswith(b'"}}]}')
    assert data(pictured).endswith(b'", "detail": "low"}}]}')


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        (image("https://host/cat.png"), 225),
        (image("data:image/png;base64,@@@@"), 225),
        (image("data:image/png;base64," + png(64, 64)), 4),
        (image("data:image/png;base64," + png(1, 1)), 1),
        (image("data:image/png;base64," + png(16_000, 16_000)), 32_768),
        (image("data:image/png;base64," + png(2**31, 5)), 225),
        (image("data:image/png;base64," + png(0, 5)), 225),
        (image("data:image/jpeg;base64," + jpeg(1024, 512)), 512),
        (image("data:image/jpeg;base64," + jpeg(1024, 512, exif=20_000)), 512),
        (image("data:image/gif;base64," + gif(320, 320)), 100),
        ({"type": "image_url", "image_url": "https://host/cat.png"}, 225),
        ({"type": "input_image", "image_url": "data:image/png;base64," + png(64, 64)}, 4),
        ({"type": "video_url", "video_url": {"url": "https://host/cat.mp4"}}, 2250),
        ({"type": "audio_url", "audio_url": {"url": "https://host/cat.mp3"}}, 14 + 125),
        ({"type": "input_audio", "input_audio": {"data": "A" * 64_000, "format": "mp3"}}, 14 + 37),
        (
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
            225,
        ),
        ({"type": "input_file", "file_data": "data:application/pdf;base64,AAAA"}, 225),
    ],
)
def test_weights(part, tokens):
    request = parse(part)
    assert [weight for _, weight in request.media] == [tokens]


@pytest.mark.parametrize(
    ("headers", "tokens"),
    [
        ({"x-llm-d-video-duration-seconds": "60"}, 60 * 225),
        ({"x-llm-d-video-resolution": "1280x720"}, 10 * 900),
        ({"x-llm-d-video-resolution": "1280x720", "x-llm-d-video-duration-seconds": "2.5"}, 2 * 900),
        ({"x-llm-d-video-duration-seconds": "16000", "x-llm-d-video-resolution": "9999x9999"}, 32_768),
        ({"x-llm-d-video-duration-seconds": "nan"}, 2250),
        ({"x-llm-d-video-duration-seconds": "1e300"}, 2250),
        ({"x-llm-d-video-duration-seconds": "soon"}, 2250),
        ({"x-llm-d-video-duration-seconds": "0.1"}, 1),
        ({"x-llm-d-video-resolution": "0x0"}, 10),
        ({"x-llm-d-video-resolution": "wide"}, 2250),
    ],
)
def test_video_goes_by_the_clients_headers(headers, tokens):
    request = parse({"type": "video_url", "video_url": {"url": "https://host/cat.mp4"}}, headers=headers)
    assert [weight for _, weight in request.media] == [tokens]


def test_several_media_in_the_order_of_the_document():
    urls = ["http://h/a", "http://h/b", "http://h/a"]
    request = parse(*map(image, urls))
    assert [digest for digest, _ in request.media] == [xxh64_hexdigest(url.encode()) for url in urls]
    for url in urls:
        assert url.encode() not in data(request)


def test_escaped_slashes_are_the_payload_as_it_was_sent():
    body = (
        rb'{"model":"m","messages":[{"role":"user","content":[{"image_url":{"url":"http:\/\/h\/a.png"}}]}]}'
    )
    request = api.find(PATH).parse("r1", PATH, {}, body)
    assert request.media[0][0] == xxh64_hexdigest(rb"http:\/\/h\/a.png")
    assert b"h\\/a.png" not in data(request)


@pytest.mark.parametrize(
    "text",
    ['{"image_url": {"url": "http://h/a.png"}}', "some_snake_case " * 200, '"input_image"', "file_data"],
)
def test_text_about_media_is_text(text):
    messages = [{"role": "user", "content": text}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    request = api.find(PATH).parse("r1", PATH, {}, body)
    assert request.media == ()
    assert data(request) == json.dumps(messages).encode()[:-1]


def test_an_image_behind_much_text_with_underscores_is_found():
    assert len(parse(image("http://h/a.png"), before="snake_case " * 500).media) == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": None},
        {"type": "image_url", "image_url": 5},
        {"type": "image_url", "image_url": {"url": None}},
        {"type": "image_url", "image_url": {"url": ""}},
        {"type": "image_url", "image_url": []},
        {"type": "input_audio", "input_audio": {"data": {}}},
    ],
)
def test_parts_that_hold_nothing_are_left_to_the_engine(part):
    request = parse(part)
    assert request.media == ()
    assert b"look" in data(request)


def test_content_of_no_known_shape_is_left_to_the_engine():
    messages = [{"role": "user", "content": 5}, {"content": [image("http://h/a.png")]}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    request = api.find(PATH).parse("r1", PATH, {}, body)
    assert request.media == ()
    assert data(request) == json.dumps(messages).encode()[:-1]


def spent_s(body):
    started = time.perf_counter()
    request = api.find(PATH).parse("r1", PATH, {}, body)
    assert request.model == "m"
    return time.perf_counter() - started


@pytest.mark.parametrize(
    "content",
    [
        [image("a")] * 20_000,
        [{"file_data": "zz", "image_url": f"h{at}"} for at in range(20_000)],
        ['"' + "a" * 70] * 2000 + [image("a" * 70 + "b")] * 2000,
        [{"type": "text", "text": "a" * 500_000}, image("a" * 100_000 + "b")],
        [{}] * 500_000,
    ],
)
def test_hostile_parts_take_no_more_than_their_bytes(content):
    """Many payloads, needles that nearly match, parts in no order: time stays in proportion to the body."""
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": content, "file_data": ""}]}
    ).encode()
    assert spent_s(body) < 0.5


def test_media_beyond_a_bound_stay_text():
    request = parse(*[image(f"http://h/{at}.png") for at in range(200)])
    assert len(request.media) == 128
    assert b"http://h/127.png" not in data(request)
    assert b"http://h/128.png" in data(request)
