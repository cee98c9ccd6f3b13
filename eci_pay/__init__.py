"""eci-pay: the payment service layer. It knows neither the HTTP server nor the terminal."""

from importlib.metadata import version

__version__ = version("eci-pay")
