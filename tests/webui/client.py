"""A WebUI's API for the tests: only what they need, with the standard library."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


class Refused(Exception):
    """The API's answer was no picture."""

    def __init__(self, status: int, answer: str) -> None:
        super().__init__(f"{status}: {answer}")
        self.status, self.answer = status, answer


@dataclass(frozen=True)
class Pictures:
    """Pictures of one job, uint8 (H, W, 3) each, their infotexts, and how long the job took in seconds."""

    images: list[np.ndarray]
    infotexts: list[str]
    seconds: float

    @property
    def image(self) -> np.ndarray:
        return self.images[0]

    @property
    def infotext(self) -> str:
        return self.infotexts[0]


class WebUI:
    """A running WebUI at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def call(self, path: str, body: Any = None, timeout: float = 900) -> Any:
        """GET, or POST where there is a body; of the WebUI's own API unless `path` begins with a slash. Raises Refused for any status
        but 2xx."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + (path if path.startswith("/") else f"/sdapi/v1/{path}"),
            data,
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as problem:
            raise Refused(problem.code, problem.read().decode()) from None

    def txt2img(self, composed: Any = None, **fields: Any) -> Pictures:
        return self._pictures("txt2img", composed, fields)

    def img2img(self, composed: Any = None, **fields: Any) -> Pictures:
        return self._pictures("img2img", composed, fields)

    def _pictures(self, kind: str, composed: Any, fields: dict[str, Any]) -> Pictures:
        """`composed`: LoRAtorio's knobs (a mapping), its positional arguments (a list), or None for unticked."""
        body = {**PLAIN, **fields}
        scripts = dict(body.pop("scripts", {}))
        if composed is not None:
            values = [{"enabled": True, **composed}] if isinstance(composed, dict) else composed
            scripts["LoRAtorio"] = values
        body["alwayson_scripts"] = {name: {"args": args} for name, args in scripts.items()}
        start = time.perf_counter()
        answer = self.call(kind, body)
        seconds = time.perf_counter() - start
        return Pictures(
            [pixels(image) for image in answer["images"]], json.loads(answer["info"])["infotexts"], seconds
        )

    def lora_names(self) -> list[str]:
        return sorted(each["name"] for each in self.call("loras"))


SIZE = int(os.environ.get("LORATORIO_WEBUI_SIZE", "64"))
"""Side of the pictures in pixels."""

PLAIN = {
    "prompt": "a red circle",
    "negative_prompt": "blurry",
    "seed": 7,
    "steps": 4,
    "cfg_scale": float(os.environ.get("LORATORIO_WEBUI_CFG", "5")),
    "width": SIZE,
    "height": SIZE,
    "sampler_name": "Euler",
    "save_images": False,
    "do_not_save_grid": True,
}


def pixels(encoded: str) -> np.ndarray:
    """A picture of an API answer."""
    picture = Image.open(io.BytesIO(base64.b64decode(encoded.split(",", 1)[-1])))
    return np.asarray(picture.convert("RGB"))


def encoded(picture: np.ndarray) -> str:
    """A picture for an API call, (H, W, 3) or (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures; infinite for equal ones."""
    assert one.shape == other.shape, (one.shape, other.shape)
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def note(infotext: str) -> str:
    """The note, or nothing."""
    found = re.search(r'LoRAtorio note: ("(?:[^"\\]|\\.)*"|[^,]*)', infotext)
    return found[1].strip('"') if found else ""
