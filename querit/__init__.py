"""The library behind every door: command line, server, Space and recipes rank through it.

>>> import querit
>>> ranker = querit.load()  # the released Nano; or a folder, a Hub repo, an .onnx file
>>> ranker("Where do puffins nest?", ["In burrows on sea cliffs.", "In the north, days are short."], top_k=1)
"""

from querit.loading import HUB_ID, RELEASED, load, named

__all__ = ["HUB_ID", "RELEASED", "load", "named"]
