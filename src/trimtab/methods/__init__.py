"""The methods, one folder an axis. A method computes; the engine walks."""
