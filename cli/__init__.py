"""The terminal edge: parses arguments, calls the service layer, prints answers and errors."""
