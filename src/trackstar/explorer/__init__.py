"""The explorer: result files and live questions to an index in a browser, as a JSON API and a page.

In: result files in the paper's release format, and an index with its model. Out: proponents and
opponents with their influences (Eq. 1), the influence of each token, and the measured effect of one
training step (tail-patch).
"""

from trackstar.explorer.app import make_app
from trackstar.explorer.server import serve

__all__ = ["make_app", "serve"]
