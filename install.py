"""Nothing to install: every WebUI has torch, numpy, safetensors, Pillow and gradio. This prints which of them are too old."""

import importlib.metadata

NEEDED = {"torch": (2, 1), "gradio": (3, 41)}


def too_old() -> list[str]:
    """A sentence for every package of the WebUI that is older than LoRAtorio can use."""
    sentences = []
    for package, needed in NEEDED.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        if numbers < needed:
            wanted = ".".join(map(str, needed))
            sentences.append(
                f"LoRAtorio needs {package} {wanted} or newer, but this WebUI has {version}: update the WebUI."
            )
    return sentences


for sentence in too_old():
    print(sentence)
