"""LoRAtorio: several LoRAs in one picture, each as its own opinion, composed patch by patch (arXiv 2508.11624).

Importing this package imports nothing else, so that a WebUI's start-up pays nothing for it.
"""

__version__ = "0.5.3"
