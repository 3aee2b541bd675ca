"""Small HTTP servers that speak SGLang's and OpenAI's APIs, with a known model behind them.

The model answers t + 1 after token t. With speculation every pass gains 2 tokens, except that every third
pass gains 4 (a chain of three draft tokens, all accepted).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCAB = 280


PATIENCE_S = 60  # only a client that never sends so many requests at once waits this long


@dataclass
class FakeServer:
    """Settings of a fake server, and what it was asked."""

    engine: str = "sglang"  # sglang, vllm, or openai (a server that reports little)
    drafts: int = 3  # draft tokens per pass; 0: no speculation
    model: str = "model"
    context: int | None = 4096
    wait_s: float = 0.002  # for each pass
    other_token_at: int | None = None  # the answer differs from the model's at this position
    gap: float = 0.1  # log probability of the model's token minus that of the other one
    fail_after: int | None = None  # requests
    requests: list[dict[str, Any]] = field(default_factory=list)
    flushes: int = 0
    can_flush: bool | None = None  # what vLLM's developer mode answers; None: it is off
    in_flight: int = 0
    most_in_flight: int = 0
    together: int = 1  # requests are answered once so many have been in flight, or after PATIENCE_S
    counters: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def passes(self, prompt: list[int], longest: int, stops: list[int]) -> Iterator[tuple[list[int], int]]:
        """Yield (tokens, draft tokens accepted) of each pass; the first one reads the prompt."""
        token, made, count = prompt[-1], 0, 0
        while made < longest:
            accepted = 0
            if count and self.drafts:
                accepted = 3 if count % 3 == 0 else 1
            new = []
            for _ in range(accepted + 1):
                token = (token + (2 if made + len(new) == self.other_token_at else 1)) % VOCAB
                new.append(token)
                if token in stops:
                    break
            new = new[: longest - made]
            made, count = made + len(new), count + 1
            yield new, accepted
            if new[-1] in stops:
                return


class Handler(BaseHTTPRequestHandler):
    """The addresses that the benchmark uses."""

    fake: FakeServer

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def reply(self, body: Any, status: int = 200) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        fake = self.fake
        if self.path == "/v1/models":
            card: dict[str, Any] = {"id": fake.model, "owned_by": fake.engine}
            if fake.context:
                card["max_model_len"] = fake.context
            self.reply({"data": [card]})
        elif self.path == "/server_info" and fake.engine == "sglang":
            speculation = {"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": fake.drafts + 1}
            known = {"model_path": fake.model, "version": "0.5.17", "context_length": None}
            self.reply(known | (speculation if fake.drafts else {"speculative_algorithm": None}))
        elif self.path == "/version" and fake.engine == "vllm":
            self.reply({"version": "0.33.0"})
        elif self.path == "/metrics" and fake.engine == "vllm":
            if fake.drafts:
                self.count(0, passes=0)  # the counters exist before the first pass
            lines = [f"vllm:spec_decode_num_{name} {value}.0" for name, value in fake.counters.items()]
            self.reply("# HELP something\n" + "\n".join(lines) + "\n")
        else:
            self.reply({"error": "not found"}, 404)

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if self.path.startswith("/flush_cache") and fake.engine == "sglang":
            fake.flushes += 1
            self.reply("Cache flushed.")
        elif self.path == "/reset_prefix_cache" and fake.engine == "vllm" and fake.can_flush is not None:
            fake.flushes += fake.can_flush
            self.reply({"success": fake.can_flush})
        elif self.path == ("/generate" if fake.engine == "sglang" else "/v1/completions"):
            self.generate(body)
        else:
            self.reply({"error": "not found"}, 404)

    def generate(self, body: dict[str, Any]) -> None:
        fake = self.fake
        with fake.lock:
            fake.requests.append(body)
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            failing = fake.fail_after is not None and len(fake.requests) > fake.fail_after
        patience = time.monotonic() + PATIENCE_S
        while fake.most_in_flight < fake.together and time.monotonic() < patience:
            time.sleep(0.001)
        try:
            if failing:
                self.reply({"error": "out of memory"}, 500)
            elif body.get("return_logprob"):
                first, other = body["token_ids_logprob"]
                rows = [[[-0.5, first, None], [-0.5 - fake.gap, other, None]]]
                self.reply({"meta_info": {"output_token_ids_logprobs": rows}})
            elif body.get("logprobs"):
                token = (body["prompt"][-1] + 1) % VOCAB
                top = {f"token_id:{token}": -0.5, f"token_id:{token + 1}": -0.5 - fake.gap}
                self.reply({"choices": [{"logprobs": {"top_logprobs": [top]}}]})
            else:
                self.send_response(200)
                self.end_headers()
                events = self.sglang(body) if fake.engine == "sglang" else self.openai(body)
                for event in events:
                    time.sleep(fake.wait_s)
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
        finally:
            with fake.lock:
                fake.in_flight -= 1

    def sglang(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        sampling = body["sampling_params"]
        longest, stops = sampling["max_new_tokens"], sampling["stop_token_ids"]
        ids: list[int] = []
        histogram = [0] * (self.fake.drafts + 1)
        passes = drafted = 0
        steps = list(self.fake.passes(body["input_ids"], longest, stops))
        for i, (new, accepted) in enumerate(steps):
            ids += new
            if i and self.fake.drafts:
                passes, drafted = passes + 1, drafted + accepted
                histogram[accepted] += 1
            meta: dict[str, Any] = {"completion_tokens": len(ids), "finish_reason": None}
            if i == len(steps) - 1:
                kind = "stop" if ids[-1] in stops else "length"
                meta["finish_reason"] = {"type": kind}
                if passes:
                    meta |= {"spec_verify_ct": passes, "spec_num_correct_drafts": drafted}
                    meta["spec_correct_drafts_histogram"] = histogram
            yield {"output_ids": ids, "meta_info": meta}

    def openai(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        vllm = self.fake.engine == "vllm"
        stops = body.get("stop_token_ids", [])
        steps = list(self.fake.passes(body["prompt"], body["max_tokens"], stops))
        made = 0
        for i, (new, accepted) in enumerate(steps):
            made += len(new)
            finish = None if i < len(steps) - 1 else "stop" if new[-1] in stops else "length"
            choice: dict[str, Any] = {"text": "".join(f"<{t}>" for t in new), "finish_reason": finish}
            event: dict[str, Any] = {"choices": [choice]}
            if vllm:
                choice["token_ids"] = new
                event["usage"] = {"completion_tokens": made}
                if i and self.fake.drafts:
                    self.count(accepted)
            yield event
        yield {"choices": [], "usage": {"completion_tokens": made}}

    def count(self, accepted: int, passes: int = 1) -> None:
        """Count one pass, as vLLM's metrics do."""
        names = {
            "drafts_total": passes, "draft_tokens_total": passes * self.fake.drafts,
            "accepted_tokens_total": accepted,
        }
        for position in range(self.fake.drafts):
            name = f'accepted_tokens_per_pos_total{{engine="0",position="{position}"}}'
            names[name] = int(accepted > position)
        with self.fake.lock:
            for name, value in names.items():
                self.fake.counters[name] = self.fake.counters.get(name, 0) + value


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """Run a fake server on a free port."""
    handler = type("BoundHandler", (Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
