"""An agent that answers text and camera questions over MQTT with a small Phi model."""

__version__ = "0.1.0"
