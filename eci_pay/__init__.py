"""eci-pay: the payment service layer. It knows neither the HTTP server nor the terminal."""
