"""The explorer: result files and live questions to an index in a browser; a JSON API and the page that uses it."""

from trackstar.explorer.app import make_app
from trackstar.explorer.server import serve

__all__ = ["make_app", "serve"]
