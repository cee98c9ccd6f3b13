"""The HTTP edge: parses requests, calls the service layer, renders answers and problems."""
