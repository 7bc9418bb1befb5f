"""One request to generate: writes its answer as the engine makes progress, and breaks it off on command."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.sim import tokens
from pointsman.sim.connection import GARBAGE, Connection
from pointsman.sim.engine import EngineRequest
from pointsman.sim.faults import Fault
from pointsman.sim.formats.ask import Choice, Reply, Usage


class Output:
    """One sequence of a job: one choice for one of its prompts."""

    __slots__ = ("index", "job", "place", "request", "sent")

    def __init__(self, job: Job, index: int, place: int, request: EngineRequest) -> None:
        self.job = job
        self.index = index
        self.place = place
        """Where in the corpus its text begins."""
        self.request = request
        self.sent = 0
        """Tokens written."""


class Job:
    """The engine tells it of tokens; it owns what is written of them, not the connection it is written to."""

    def __init__(
        self,
        connection: Connection,
        reply: Reply,
        *,
        name: str,
        path: str,
        model: str,
        stream: bool,
        choices: int,
        reason: str,
        max_tokens: int,
        fault: Fault | None,
    ) -> None:
        self.connection = connection
        self.id = name
        self.path = path
        self.model = model
        self.stream = stream
        self.reason = reason
        """Why its outputs end: ``length`` or ``stop``."""
        self.max_tokens = max_tokens
        self.outputs: list[Output] = []
        self.unfinished = 0
        self.stalled = False
        self._choices = choices
        self._reply = reply
        self._opened = False
        self._fault = fault
        self._chunks_left = 0 if fault is None else fault.after_chunks or 0
        self._held: list[bytes] = []

    def advance(self, output: Output, generated: int) -> None:
        """``generated`` tokens of ``output`` are out: write the new ones."""
        before = self._opening()
        text = tokens.output(output.place, output.sent, generated)
        output.sent = generated
        frame = self.connection.frame(self._reply.piece(output.index, text, None))
        if before or self._fault is not None:
            self._write([*before, frame])
        else:
            self.connection.write(frame)

    def finish(self, output: Output) -> bool:
        """``output`` is complete; whether the whole answer is."""
        self.unfinished -= 1
        if self.stream:
            self._write(self._last_frames(output))
        elif not self.unfinished:
            self._write(self._answer())
        if not self.unfinished and not self.stalled:
            self.connection.done()
        return not self.unfinished

    def resume(self) -> None:
        """A stall is over: write what was held back."""
        self.stalled = False
        self._fault = None
        self._write(self._held)
        self._held = []
        if not self.unfinished:
            self.connection.done()

    def usage(self) -> Usage:
        first_choices = [output.request for output in self.outputs[:: self._choices]]
        return Usage(
            sum(request.prompt_tokens for request in first_choices),
            sum(output.request.output_tokens for output in self.outputs),
            sum(request.cached_tokens for request in first_choices),
        )

    def _opening(self) -> Sequence[bytes]:
        if self._opened:
            return ()
        self._opened = True
        return [self.connection.frame(event) for event in self._reply.opening()]

    def _last_frames(self, output: Output) -> list[bytes]:
        total = output.request.output_tokens
        text = tokens.output(output.place, output.sent, total)
        output.sent = total
        frames = list(self._opening())
        events = [self._reply.piece(output.index, text, self.reason)]
        if not self.unfinished:
            events += self._reply.closing(self._texts(), self.usage())
        frames += [self.connection.frame(event) for event in events]
        if not self.unfinished:
            frames.append(self.connection.last_frame())
        return frames

    def _answer(self) -> Sequence[bytes]:
        """A plain answer in two parts, so that a fault can hit it in the middle."""
        body = self._reply.whole(self._texts(), self.usage())
        head = self.connection.head(200, b"content-length: %d" % len(body), "application/json")
        half = len(body) // 2
        self._chunks_left = 1
        return head + body[:half], body[half:]

    def _texts(self) -> list[Choice]:
        return [
            Choice(o.index, tokens.output(o.place, 0, o.request.output_tokens), self.reason)
            for o in self.outputs
        ]

    def _write(self, frames: Sequence[bytes]) -> None:
        if self._fault is None:
            self.connection.write(b"".join(frames))
            return
        for frame in frames:
            if self._chunks_left:
                self._chunks_left -= 1
                self.connection.write(frame)
            else:
                self._break_off(self._fault, frame)

    def _break_off(self, fault: Fault, frame: bytes) -> None:
        if fault.kind == "stall":
            self.stalled = True
            self._held.append(frame)
        elif fault.kind == "reset":
            self.connection.reset()
        else:
            self.connection.write(GARBAGE if fault.kind == "garbage" else frame[: len(frame) // 2])
            self.connection.transport.close()
